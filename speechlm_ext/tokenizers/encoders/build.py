"""Builds an encoder from its name; ``mfcc`` and ``log-mel``, which need no model, are here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram
from speechlm_ext.tokenizers.encoders.spec import (
    SAMPLE_RATE,
    EncoderSpec,
    FeatureEncoder,
    average_frames,
    check_encoder_wave,
)
from speechlm_ext.utils.device import one_thread

NUM_FEATURES = 39
_NUM_CEPSTRA = 13


def build_encoder(
    spec: EncoderSpec | str, *, frames_per_token: int = 1, device: str | torch.device = "cpu"
) -> FeatureEncoder:
    """Make the encoder that ``spec`` names, on ``device`` if it is a model; without one it runs on the CPU.

    With a string, ``frames_per_token`` frames are averaged to one.

    Raises:
        ConfigError: an encoder that is not known.
        TokenizerError: the model is missing, damaged, of a family that is not supported, or has no such layer.
    """
    if isinstance(spec, str):
        spec = EncoderSpec.parse(spec, frames_per_token)
    if spec.kind != "hf":
        return SignalEncoder(spec)
    from speechlm_ext.tokenizers.encoders.huggingface import HFEncoder  # which loads transformers

    return HFEncoder(spec, device=device)


class SignalEncoder(FeatureEncoder):
    """MFCCs or log-mel bands, 100 frames/s before averaging.

    Computed on one thread, so the features do not depend on the number of cores.

    Args:
        spec: of kind ``mfcc`` or ``log-mel``.
        sample_rate: Hz of the waveforms; ``log-mel`` is defined at 16000 only.
    """

    def __init__(self, spec: EncoderSpec, sample_rate: int = SAMPLE_RATE) -> None:
        self.spec, self.sample_rate = spec, sample_rate
        self.frame_rate = 100 / spec.frames_per_token
        self._analyze: Callable[[np.ndarray], torch.Tensor]
        if spec.kind == "mfcc":
            self._analyze, self.num_features = MFCC(sample_rate), NUM_FEATURES
        else:
            config = MelConfig()
            self._analyze, self.num_features = MelSpectrogram(config).encode, config.num_mels

    def __call__(self, wave: np.ndarray, sample_rate: int | None = None) -> torch.Tensor:
        """See `FeatureEncoder`."""
        wave = check_encoder_wave(wave, sample_rate, self)
        with one_thread():
            return average_frames(self._analyze(wave), self.spec.frames_per_token)


class MFCC:
    """13 cepstra with their first and second differences: 39 features every 10 ms at ``sample_rate``.

    HuBERT's first iteration clusters them (Hsu et al., 2021). Cepstra are the orthonormal DCT-II of 40 log-mel bands
    (25 ms window), differences are regressions over ±2 frames.
    """

    def __init__(self, sample_rate: int) -> None:
        hop = sample_rate // 100
        n_fft = 1 << math.ceil(math.log2(hop * 5 // 2))
        self.hop = hop
        self._mel = MelSpectrogram(
            MelConfig(
                sample_rate=sample_rate,
                num_mels=40,
                hop=hop,
                window=hop * 5 // 2,
                n_fft=n_fft,
                f_min=20.0,
                f_max=sample_rate / 2,
                floor=1e-5,
            )
        )
        k = torch.arange(_NUM_CEPSTRA, dtype=torch.float64)[:, None]
        m = torch.arange(40, dtype=torch.float64)[None]
        dct_CM = torch.cos(math.pi / 40 * (m + 0.5) * k) * math.sqrt(2 / 40)
        dct_CM[0] /= math.sqrt(2)
        self._dct_CM = dct_CM.float()

    def __call__(self, wave: np.ndarray) -> torch.Tensor:
        """Features ``[ceil(n / hop), 39]`` float32 of a waveform ``[n]``."""
        cepstra_TC = self._mel.encode(wave) @ self._dct_CM.T
        first_TC = deltas(cepstra_TC)
        return torch.cat([cepstra_TC, first_TC, deltas(first_TC)], dim=1)


def deltas(x_TC: torch.Tensor) -> torch.Tensor:
    """Slope of each feature by regression over ±2 frames; the ends are repeated."""
    padded = torch.cat([x_TC[:1].expand(2, -1), x_TC, x_TC[-1:].expand(2, -1)])
    length = len(x_TC)
    at = [padded[offset : offset + length] for offset in range(5)]
    return (2 * (at[4] - at[0]) + (at[3] - at[1])) / 10
