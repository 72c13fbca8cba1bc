"""``rvq-kmeans``: a codec without training or downloads, residual K-Means over log-mel frames.

``frames_per_token`` consecutive 10 ms log-mel frames form one token frame (2: 50 Hz, 4: 25 Hz). Stage ``s`` quantizes
the residual of stages ``0..s-1`` with its own codebook. Encoding keeps the ``beam`` best partial codes instead of the
single best, which lowers the error by about an eighth at no cost in decoding (:mod:`.rvq_search`). Decoding sums the
chosen centroids and turns the mel frames into sound block by block (:mod:`.rvq_stream`).

Frames: a waveform of ``n`` samples has ``T = ceil(n / frame_samples)`` frames, ``frame_samples = hop *
frames_per_token``, and decodes to ``T * frame_samples`` samples; the end of the last frame is silence that the input
does not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers.artifact import ArrayTokenizer
from speechlm_ext.tokenizers.base import register_tokenizer
from speechlm_ext.tokenizers.centroids import extract_features, fit, sample_rows
from speechlm_ext.tokenizers.codecs.config import RVQConfig
from speechlm_ext.tokenizers.codecs.rvq_search import SearchTables, beam_search, search_tables
from speechlm_ext.tokenizers.codecs.rvq_stream import RVQStreamDecoder
from speechlm_ext.tokenizers.encoders.mel import MelSpectrogram
from speechlm_ext.tokenizers.encoders.spec import stack_frames
from speechlm_ext.utils.device import one_thread
from speechlm_ext.utils.files.json_shape import build


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
            book_KF, codes_N = fit(
                residual_NF, c.codebook_size, seed=seed + stage, iterations=c.fit_iterations
            )
            books.append(book_KF)
            residual_NF = residual_NF - book_KF[codes_N]
        return cls(c, mean_F, torch.stack(books))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes of a float32 waveform ``[n]``: int32 ``[ceil(n / frame_samples), num_codebooks]``.

        Raises:
            AudioError: an empty or unusable waveform.
        """
        wave = check_wave(x, "waveform for the codec")
        with one_thread():
            features_TF = stack_frames(self._mel.encode(wave), self.config.frames_per_token) - self.mean_F
            codes_TS = beam_search(features_TF, self.codebooks_SKF, self.config.beam, tables=self._tables)
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


register_tokenizer(RVQKMeansCodec.kind, RVQKMeansCodec)
