"""``rvq-kmeans``: a codec without training or downloads, residual K-Means over log-mel frames.

``frames_per_token`` consecutive 10 ms log-mel frames form one token frame (2: 50 Hz, 4: 25 Hz). Stage ``s`` quantizes
the residual of stages ``0..s-1`` with its own codebook. Encoding keeps the ``beam`` best partial codes instead of the
single best, which lowers the error by about an eighth at no cost in decoding (:mod:`.rvq_search`). Decoding sums the
chosen centroids and turns the mel frames into sound block by block (:class:`RVQStreamDecoder`).

Frames: a waveform of ``n`` samples has ``T = ceil(n / frame_samples)`` frames, ``frame_samples = hop *
frames_per_token``, and decodes to ``T * frame_samples`` samples; the end of the last frame is silence that the input
does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.tokenizers.artifact import ArrayTokenizer
from speechlm_ext.tokenizers.base import register_tokenizer
from speechlm_ext.tokenizers.centroids import extract_features, fit, sample_rows
from speechlm_ext.tokenizers.codecs.phase import OnlinePhase
from speechlm_ext.tokenizers.codecs.rvq_search import SearchTables, beam_search, search_tables
from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram
from speechlm_ext.tokenizers.encoders.spec import stack_frames
from speechlm_ext.tokenizers.streaming import CodeBuffer
from speechlm_ext.utils.device import one_thread
from speechlm_ext.utils.files.json_shape import build
from speechlm_ext.utils.options import check_positive

#: Min. mel frames of a block: with fewer, a step has little new data and reaches less.
BLOCK = 4
#: Mel frames that are held back. Fewer lower the latency and cost accuracy: 2 add 4 % to the log-mel error of phase
#: reconstruction, 0 add half of it.
LOOKAHEAD = 6


@dataclass(frozen=True)
class RVQConfig:
    """Settings of the codec."""

    mel: MelConfig = field(default_factory=MelConfig)
    """The log-mel analysis."""
    frames_per_token: int = 2
    """Mel frames (10 ms) in one token frame: 2 is 50 Hz, 4 is 25 Hz."""
    num_codebooks: int = 8
    """Residual stages."""
    codebook_size: int = 256
    """Centroids of a stage."""
    beam: int = 4
    """Partial codes kept while encoding; 1 is greedy."""
    griffin_lim_iterations: int = 60
    """Steps of phase reconstruction."""
    griffin_lim_momentum: float = 0.99
    """Momentum of fast Griffin-Lim."""
    max_fit_frames: int = 30000
    """Max. token frames of the fit, drawn at random."""
    fit_iterations: int = 10
    """Lloyd steps of each stage."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "frames_per_token",
            "num_codebooks",
            "codebook_size",
            "beam",
            "max_fit_frames",
            "fit_iterations",
        )
        if self.griffin_lim_iterations < 0 or not 0 <= self.griffin_lim_momentum < 1:
            raise ConfigError(
                "rvq-kmeans codec: griffin_lim_iterations must be >= 0 and griffin_lim_momentum in [0, 1), "
                f"got {self.griffin_lim_iterations} and {self.griffin_lim_momentum}."
            )

    @property
    def num_features(self) -> int:
        """Values of a token frame: its stacked mel bands."""
        return self.frames_per_token * self.mel.num_mels

    @property
    def frame_samples(self) -> int:
        """Samples of a token frame."""
        return self.mel.hop * self.frames_per_token

    @property
    def frame_rate(self) -> float:
        """Token frames per second."""
        return self.mel.sample_rate / self.frame_samples


class RVQKMeansCodec(ArrayTokenizer):
    """Residual vector quantizer with K-Means codebooks over stacked log-mel frames; see the module's text.

    Args:
        config: settings.
        mean: float32 ``[F]`` with ``F = frames_per_token * num_mels``, subtracted before the first stage.
        codebooks: float32 ``[num_codebooks, codebook_size, F]``.

    Raises:
        TokenizerError: arrays of other shapes.
    """

    kind = "rvq-kmeans"
    modality = "codec"

    def __init__(self, config: RVQConfig, mean: torch.Tensor, codebooks: torch.Tensor) -> None:
        expected = (config.num_codebooks, config.codebook_size, config.num_features)
        if tuple(codebooks.shape) != expected or tuple(mean.shape) != (config.num_features,):
            raise TokenizerError(
                f"rvq-kmeans codec: expected codebooks {list(expected)} and mean [{config.num_features}], got "
                f"{list(codebooks.shape)} and {list(mean.shape)}."
            )
        self.config = config
        self.mean_F = mean.float().contiguous()
        self.codebooks_SKF = codebooks.float().contiguous()
        self.vocab_sizes: tuple[int, ...] = (config.codebook_size,) * config.num_codebooks
        self.sample_rate: int | None = config.mel.sample_rate
        self.frame_samples = config.frame_samples
        self.frame_rate: float | None = config.frame_rate
        self._mel = MelSpectrogram(config.mel)

    @classmethod
    def fit(
        cls, waves: Iterable[np.ndarray], config: RVQConfig | None = None, *, seed: int = 0
    ) -> RVQKMeansCodec:
        """Fit the codebooks to recordings, in seconds.

        Args:
            waves: float32 ``[n]`` waveforms at ``config.mel.sample_rate``; an iterator is read once.
            seed: of the choice of frames and of K-Means.

        Raises:
            TokenizerError: fewer token frames than ``codebook_size``.
            AudioError: a waveform that cannot be used.
        """
        c = config or RVQConfig()
        mel = MelSpectrogram(c.mel)
        x_NF = extract_features(
            waves,
            lambda wave: stack_frames(mel.encode(wave), c.frames_per_token),
            frame_rate=c.frame_rate,
            num_clusters=c.codebook_size,
            setting="codebook_size",
        )
        x_NF = sample_rows(x_NF, c.max_fit_frames, seed)
        mean_F = x_NF.mean(0)
        residual_NF = x_NF - mean_F
        books = []
        for stage in range(c.num_codebooks):
            fitted = fit(residual_NF, c.codebook_size, seed=seed + stage, iterations=c.fit_iterations)
            books.append(fitted.cluster_centers_)
            residual_NF = residual_NF - fitted.cluster_centers_[torch.as_tensor(fitted.labels_).long()]
        return cls(c, mean_F, torch.stack(books))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes of a float32 waveform ``[n]``: int32 ``[ceil(n / frame_samples), num_codebooks]``.

        Raises:
            AudioError: an empty or unusable waveform.
        """
        wave = check_wave(x, "waveform for the codec")
        with one_thread():
            features_TF = stack_frames(self._mel.encode(wave), self.config.frames_per_token) - self.mean_F
            codes_TS = beam_search(features_TF, self.codebooks_SKF, self._tables, self.config.beam)
            return codes_TS.numpy().astype(np.int32)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Waveform of codes ``[T, num_codebooks]``: float32 ``[T * frame_samples]`` in [-1, 1].

        The same bits as :meth:`stream_decoder` gives, however the codes are split.

        Raises:
            TokenizerError: not such codes.
        """
        decoder = self.stream_decoder()
        return np.concatenate([decoder.push(ids), decoder.flush()])

    def stream_decoder(self) -> RVQStreamDecoder:
        """A decoder for codes that arrive piece by piece."""
        return RVQStreamDecoder(self.config, self.magnitude)

    def magnitude(self, codes_TS: np.ndarray) -> torch.Tensor:
        """STFT magnitudes ``[T * frames_per_token, n_fft / 2 + 1]`` of codes."""
        return self._mel.magnitude(self.log_mel(codes_TS))

    def log_mel(self, codes_TS: np.ndarray) -> torch.Tensor:
        """Log-mel bands ``[T * frames_per_token, num_mels]`` of codes."""
        codes = torch.from_numpy(np.ascontiguousarray(codes_TS, dtype=np.int64))
        stages = torch.arange(self.config.num_codebooks)
        features_TF = self.codebooks_SKF[stages, codes].sum(1) + self.mean_F
        return features_TF.reshape(-1, self.config.mel.num_mels)

    @cached_property
    def _tables(self) -> SearchTables:
        return search_tables(self.codebooks_SKF)

    def settings(self) -> dict[str, Any]:
        """Settings of the codec."""
        return asdict(self.config)

    def arrays(self) -> dict[str, torch.Tensor]:
        """See `ArrayTokenizer`."""
        return {"mean": self.mean_F, "codebooks": self.codebooks_SKF}

    @classmethod
    def from_artifact(cls, settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> RVQKMeansCodec:
        """See `ArrayTokenizer`."""
        return cls(build(RVQConfig, settings, "config"), arrays["mean"], arrays["codebooks"])


class RVQStreamDecoder:
    """Stream decoder of an ``rvq-kmeans`` codec: codes → log-mel → magnitudes → phase, block by block.

    A block is one token frame or, where that has fewer than ``BLOCK`` mel frames, the fewest token frames with that
    many. ``LOOKAHEAD`` mel frames are held back until the next block is there, and half a window more is incomplete
    until then: 80 ms in all at the default settings, one token frame of 80 ms. Each mel frame goes through about
    ``griffin_lim_iterations`` steps of Griffin-Lim, so streaming costs as much as decoding a whole utterance.

    Args:
        config: the codec's settings.
        magnitude: STFT magnitudes ``[T * frames_per_token, n_fft / 2 + 1]`` of codes ``[T, num_codebooks]``.
    """

    def __init__(self, config: RVQConfig, magnitude: Callable[[np.ndarray], torch.Tensor]) -> None:
        c = config
        self._magnitude = magnitude
        self._buffer = CodeBuffer((c.codebook_size,) * c.num_codebooks)
        self._block = math.ceil(BLOCK / c.frames_per_token)
        num_mel = self._block * c.frames_per_token
        self._phase = OnlinePhase(
            c.mel,
            lookahead=LOOKAHEAD,
            # A frame is in the window of its own block and, while it is held back, of the next ones.
            iterations=math.ceil(c.griffin_lim_iterations * num_mel / (num_mel + LOOKAHEAD)),
            momentum=c.griffin_lim_momentum,
        )
        self.frame_samples = c.frame_samples
        self.lookahead = math.ceil(self._phase.lag / self.frame_samples) + self._block - 1

    def push(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        self._buffer.push(codes)
        parts = [np.zeros(0, np.float32)]
        while len(self._buffer.codes_TC) >= self._block:
            parts.append(self._decode(self._block))
        return np.concatenate(parts)

    def flush(self) -> np.ndarray:
        """See :class:`StreamDecoder`."""
        rest = len(self._buffer.codes_TC)
        parts = [self._decode(rest)] if rest else []
        with one_thread(), torch.inference_mode():
            parts.append(self._phase.finish().numpy())
        self._buffer.reset()
        return np.concatenate(parts)

    def _decode(self, num_frames: int) -> np.ndarray:
        """Samples that the next ``num_frames`` frames complete."""
        start = self._buffer.start
        codes_TC = self._buffer.slice(start, start + num_frames)
        self._buffer.drop_before(start + num_frames)
        with one_thread(), torch.inference_mode():
            return self._phase.push(self._magnitude(codes_TC)).numpy()


register_tokenizer(RVQKMeansCodec.kind, RVQKMeansCodec)
