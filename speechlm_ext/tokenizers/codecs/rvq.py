"""``rvq-kmeans``: a codec without training or downloads, residual K-Means over log-mel frames.

``frames_per_token`` consecutive 10 ms log-mel frames make one token frame (2: 50 Hz, 4: 25 Hz). Stage ``s``
quantises what stages ``0..s-1`` left over, with its own codebook. Encoding keeps the ``beam`` best partial
codes instead of the single best, which lowers the error by about an eighth at no cost in decoding. Decoding
sums the chosen centroids and turns the mel frames into sound as they come (:mod:`.rvq_stream`).

Frames: a waveform of ``n`` samples has ``ceil(n / (hop * frames_per_token))`` frames and decodes to that many
times ``hop * frames_per_token`` samples; the end of the last frame is silence that was not in the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from speechlm_ext.audio.files import check_wave
from speechlm_ext.errors import TokenizerError
from speechlm_ext.tokenizers import base
from speechlm_ext.tokenizers.centroids import fit
from speechlm_ext.tokenizers.codecs.config import RVQConfig
from speechlm_ext.tokenizers.codecs.rvq_stream import RVQStreamDecoder
from speechlm_ext.tokenizers.encoders.mel import MelSpectrogram, one_thread
from speechlm_ext.utils.files.json_shape import build


class RVQKMeansCodec:
    """Residual vector quantiser with K-Means codebooks over stacked log-mel frames; see the module's text.

    Args:
        config: settings.
        mean: float32 ``[F]`` with ``F = frames_per_token * num_mels``, subtracted before the first stage.
        codebooks: float32 ``[num_codebooks, codebook_size, F]``.
    """

    kind = "rvq-kmeans"
    modality = "codec"

    def __init__(self, config: RVQConfig, mean: torch.Tensor, codebooks: torch.Tensor) -> None:
        width = config.frames_per_token * config.mel.num_mels
        expected = (config.num_codebooks, config.codebook_size, width)
        if tuple(codebooks.shape) != expected or tuple(mean.shape) != (width,):
            raise TokenizerError(
                f"rvq-kmeans codec: expected codebooks {list(expected)} and mean [{width}], got "
                f"{list(codebooks.shape)} and {list(mean.shape)}."
            )
        self.config = config
        self.mean_F = mean.float().contiguous()
        self.codebooks_SKF = codebooks.float().contiguous()
        self.vocab_sizes: tuple[int, ...] = (config.codebook_size,) * config.num_codebooks
        self.sample_rate: int | None = config.mel.sample_rate
        self.frame_samples = config.mel.hop * config.frames_per_token
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
        config = config or RVQConfig()
        mel = MelSpectrogram(config.mel)
        parts = [
            stack_frames(
                mel.encode(check_wave(wave, f"waveform {index} of the codec's fit")), config.frames_per_token
            )
            for index, wave in enumerate(waves)
        ]
        x_NF = torch.cat(parts) if parts else torch.zeros(0, config.frames_per_token * config.mel.num_mels)
        if len(x_NF) > config.max_fit_frames:
            order = torch.randperm(len(x_NF), generator=torch.Generator().manual_seed(seed))
            x_NF = x_NF[order[: config.max_fit_frames]]
        if len(x_NF) < config.codebook_size:
            raise TokenizerError(
                f"rvq-kmeans codec: {config.codebook_size} codes need at least as many frames, got "
                f"{len(x_NF)} "
                f"({len(x_NF) * config.mel.hop * config.frames_per_token / config.mel.sample_rate:.1f} s of "
                f"audio). Give more audio to fit on, or set codebook_size to at most {len(x_NF)}."
            )
        mean_F = x_NF.mean(0)
        rest_NF = x_NF - mean_F
        books = []
        for stage in range(config.num_codebooks):
            what = f"rvq-kmeans codec, stage {stage}"
            book, codes = fit(
                rest_NF, config.codebook_size, seed=seed + stage, iterations=config.fit_iterations, what=what
            )
            books.append(book)
            rest_NF = rest_NF - book[codes]
        return cls(config, mean_F, torch.stack(books))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes of a float32 waveform ``[n]`` at ``sample_rate``: int32 ``[ceil(n / frame_samples),
        num_codebooks]``.

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

        The same bits as :meth:`stream_decoder` gives, whatever the codes were pushed in.

        Raises:
            TokenizerError: not such codes.
        """
        decoder = self.stream_decoder()
        return np.concatenate([decoder.push(ids), decoder.flush()])

    def stream_decoder(self) -> RVQStreamDecoder:
        """A decoder for codes that arrive bit by bit."""
        return RVQStreamDecoder(self.config, self.vocab_sizes, self.magnitude)

    def decode_whole(self, ids: np.ndarray) -> np.ndarray:
        """The waveform by Griffin-Lim over the whole utterance, which needs all codes at once; shape and errors as
        :meth:`decode`."""
        codes_TS = base.check_ids(ids, self.vocab_sizes, "codec codes")
        if len(codes_TS) == 0:
            return np.zeros(0, np.float32)
        c = self.config
        return self._mel.decode(
            self.log_mel(codes_TS), iterations=c.griffin_lim_iterations, momentum=c.griffin_lim_momentum
        )

    def magnitude(self, codes_TS: np.ndarray) -> torch.Tensor:
        """STFT magnitudes ``[T * frames_per_token, n_fft / 2 + 1]`` that the codes stand for."""
        return self._mel.magnitude(self.log_mel(codes_TS))

    def log_mel(self, codes_TS: np.ndarray) -> torch.Tensor:
        """Log-mel ``[T * frames_per_token, num_mels]`` that the codes stand for, before phase."""
        codes = torch.from_numpy(np.ascontiguousarray(codes_TS, dtype=np.int64))
        stages = torch.arange(self.config.num_codebooks)
        features_TF = self.codebooks_SKF[stages, codes].sum(1) + self.mean_F
        return features_TF.reshape(-1, self.config.mel.num_mels)

    def analyse(self, wave: np.ndarray) -> torch.Tensor:
        """Log-mel ``[T * frames_per_token, num_mels]`` of a waveform: what :meth:`log_mel` approximates."""
        wave = check_wave(wave, "waveform for the codec")
        stacked_TF = stack_frames(self._mel.encode(wave), self.config.frames_per_token)
        return stacked_TF.reshape(-1, self.config.mel.num_mels)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over settings and codebooks."""
        return base.fingerprint(self.kind, _plain(self.config), base.array_bytes(self._arrays()))

    @cached_property
    def _tables(self) -> SearchTables:
        return search_tables(self.codebooks_SKF)

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean_F, "codebooks": self.codebooks_SKF}

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``arrays.safetensors`` into ``folder``."""
        base.write_arrays(folder, self.kind, _plain(self.config), self.fingerprint, self._arrays())

    @classmethod
    def load(cls, folder: str | Path) -> RVQKMeansCodec:
        """Read what :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, arrays = base.read_config(folder), base.read_arrays(folder)
        with base.artefact_errors(folder, "an rvq-kmeans codec"):
            config = build(RVQConfig, record["config"], "config")
            codec = cls(config, arrays["mean"], arrays["codebooks"])
        base.require_fingerprint(folder, record["sha256"], codec.fingerprint)
        return codec


def stack_frames(log_mel_TM: torch.Tensor, count: int) -> torch.Tensor:
    """Join each ``count`` consecutive frames: ``[T, M]`` → ``[ceil(T / count), count * M]``; the last is
    repeated."""
    missing = -len(log_mel_TM) % count
    if missing:
        log_mel_TM = torch.cat([log_mel_TM, log_mel_TM[-1:].expand(missing, -1)])
    return log_mel_TM.reshape(-1, count * log_mel_TM.shape[1])


class SearchTables(NamedTuple):
    """What the search needs to know of the codebooks, made once by :func:`search_tables`."""

    squares_SK: torch.Tensor
    """Squared norm of each centroid."""
    cross: list[torch.Tensor]
    """For stage s, float32 ``[s * K, K]``: inner products of its centroids with those of all stages before it."""


def search_tables(codebooks_SKF: torch.Tensor) -> SearchTables:
    """Norms and inner products of centroids: ``S * (S - 1) / 2 * K * K`` floats, 7 MB for 8 stages of 256."""
    width = codebooks_SKF.shape[2]
    cross = [codebooks_SKF[:s].reshape(-1, width) @ book_KF.T for s, book_KF in enumerate(codebooks_SKF)]
    return SearchTables(codebooks_SKF.square().sum(2), cross)


def beam_search(
    x_NF: torch.Tensor,
    codebooks_SKF: torch.Tensor,
    beam: int,
    chunk: int = 1024,
    tables: SearchTables | None = None,
) -> torch.Tensor:
    """Residual codes of each row, int64 ``[N, S]``, keeping the ``beam`` best partial sums at every stage.

    The residual r = x - sum of chosen centroids is never formed: with the centroids' inner products at hand,
    ``|r - c|² = |r|² - 2 (x·c - sum of chosen·c) + |c|²`` costs one row of K numbers per chosen centroid instead of
    a product over F.

    Args:
        beam: 1 is the greedy search.
        chunk: rows at a time, which bounds memory to about ``chunk * (S + 2 * beam) * K`` floats.
        tables: :func:`search_tables` of the codebooks, where the caller keeps them.
    """
    squares_SK, cross = tables or search_tables(codebooks_SKF)
    num_stages, size, _ = codebooks_SKF.shape
    found = []
    for start in range(0, len(x_NF), chunk):
        rows_NF = x_NF[start : start + chunk]
        dots_NSK = (rows_NF @ codebooks_SKF.flatten(0, 1).T).view(-1, num_stages, size)
        error_NB = rows_NF.square().sum(1, keepdim=True)
        codes_NBS = torch.zeros(len(rows_NF), 1, 0, dtype=torch.int64)
        for stage in range(num_stages):
            dots_NBK = dots_NSK[:, None, stage]
            if stage:
                bags = (codes_NBS + torch.arange(stage) * size).flatten(0, 1)
                chosen_NBK = functional.embedding_bag(bags, cross[stage], mode="sum")
                dots_NBK = dots_NBK - chosen_NBK.view(*codes_NBS.shape[:2], size)
            flat = (error_NB[..., None] + squares_SK[stage]).sub_(dots_NBK, alpha=2).flatten(1)
            error_NB, best_NB = flat.topk(min(beam, flat.shape[1]), dim=1, largest=False)
            parent_NB, code_NB = best_NB // size, best_NB % size
            history = codes_NBS.gather(1, parent_NB[..., None].expand(-1, -1, stage))
            codes_NBS = torch.cat([history, code_NB[..., None]], dim=2)
        # topk sorts ascending, so the first hypothesis is the best one.
        found.append(codes_NBS[:, 0])
    return torch.cat(found)


def _plain(config: RVQConfig) -> dict:
    return json.loads(json.dumps(asdict(config)))


base.register_tokenizer(RVQKMeansCodec.kind, RVQKMeansCodec)
