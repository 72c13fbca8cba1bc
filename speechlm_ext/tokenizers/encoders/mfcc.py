"""MFCC features: 13 cepstra with their first and second differences, 39 numbers every 10 ms.

HuBERT's first iteration clusters them (Hsu et al., 2021). Cepstra are the orthonormal DCT-II of 40 log-mel bands (25 ms
window), differences are regressions over ±2 frames.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram

NUM_FEATURES = 39
_NUM_CEPSTRA = 13


class MFCC:
    """39 features every 10 ms at ``sample_rate``."""

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
