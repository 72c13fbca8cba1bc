"""Log-mel spectrograms, input features of the codec and of units, and their inversion to STFT magnitudes.

Analysis: magnitude STFT (Hann window of 40 ms, hop 10 ms), triangular mel bands (HTK scale), ``log(mel + floor)``. The
floor is high on purpose: detail far below the speech level is inaudible, yet in logarithms it varies as much as the
speech does and would take most of the codes.

Inversion: the pseudo-inverse of the filterbank, then a few multiplicative least-squares steps that keep the magnitudes
positive. The phase comes from :mod:`speechlm_ext.tokenizers.codecs.phase`.

Frames: a waveform of ``n`` samples has ``ceil(n / hop)`` frames; frame ``i`` is centered on sample ``i * hop``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from speechlm_ext.errors import ConfigError
from speechlm_ext.utils.device import one_thread


@dataclass(frozen=True)
class MelConfig:
    """Settings of the analysis; times are in samples."""

    sample_rate: int = 16000
    """Hz."""
    num_mels: int = 80
    """Mel bands."""
    hop: int = 160
    """Samples from frame to frame."""
    window: int = 640
    """Samples of the Hann window."""
    n_fft: int = 640
    """FFT length."""
    f_min: float = 40.0
    """Lower edge of the lowest band, Hz."""
    f_max: float = 8000.0
    """Upper edge of the highest band, Hz."""
    floor: float = 1e-3
    """Added to each band's magnitude before the logarithm (a full-scale sine has magnitude about 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window // 2 <= self.n_fft // 2:
            raise ConfigError(
                f"mel analysis needs 0 < hop <= window / 2 and window <= n_fft, got hop {self.hop}, window "
                f"{self.window}, n_fft {self.n_fft}."
            )
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2 or self.num_mels < 1 or self.floor <= 0:
            raise ConfigError(
                f"mel bands need 0 <= f_min < f_max <= {self.sample_rate / 2:g} Hz, num_mels >= 1 and floor > 0, got "
                f"f_min {self.f_min}, f_max {self.f_max}, num_mels {self.num_mels}, floor {self.floor}."
            )


class MelSpectrogram:
    """Log-mel analysis on the CPU, and its inversion to magnitudes, for one :class:`MelConfig`."""

    def __init__(self, config: MelConfig) -> None:
        self.config = config
        self._window = torch.hann_window(config.window)
        self._scale = 2.0 / float(self._window.sum())

    @cached_property
    def filters_MF(self) -> torch.Tensor:
        """Triangular mel filters, float32 ``[num_mels, n_fft / 2 + 1]``, peak 1."""
        c = self.config
        edges_mel = np.linspace(_hz_to_mel(c.f_min), _hz_to_mel(c.f_max), c.num_mels + 2)
        edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
        bins = np.arange(c.n_fft // 2 + 1) * c.sample_rate / c.n_fft
        # A band narrower than two bins would miss every bin: widen it to one bin on each side.
        step = c.sample_rate / c.n_fft
        low, mid, high = edges[:-2], edges[1:-1], edges[2:]
        low, high = np.minimum(low, mid - step), np.maximum(high, mid + step)
        rising = (bins[None] - low[:, None]) / (mid - low)[:, None]
        falling = (high[:, None] - bins[None]) / (high - mid)[:, None]
        return torch.from_numpy(np.clip(np.minimum(rising, falling), 0.0, None)).float()

    @cached_property
    def _inverse_FM(self) -> torch.Tensor:
        return torch.linalg.pinv(self.filters_MF.double()).float()

    def encode(self, wave: np.ndarray) -> torch.Tensor:
        """Log-mel bands ``[ceil(n / hop), num_mels]`` float32 of a float32 waveform ``[n]``, n >= 1."""
        c = self.config
        num_frames = math.ceil(len(wave) / c.hop)
        with one_thread():
            padded = torch.zeros(num_frames * c.hop)
            padded[: len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
            spectrum_TF = torch.stft(
                padded,
                c.n_fft,
                c.hop,
                c.window,
                self._window,
                center=True,
                pad_mode="constant",
                return_complex=True,
            ).T[:num_frames]
            # Faster than abs(), which guards against overflow that audio in [-1, 1] cannot cause.
            squared_TF = spectrum_TF.real.square().addcmul_(spectrum_TF.imag, spectrum_TF.imag)
            magnitude_TF = squared_TF.sqrt_() * self._scale
            return torch.log(magnitude_TF @ self.filters_MF.T + c.floor)

    def magnitude(self, log_mel_TM: torch.Tensor) -> torch.Tensor:
        """STFT magnitudes ``[T, n_fft / 2 + 1]`` (in STFT units, >= 0) with approximately these mel bands."""
        mel_TM = (log_mel_TM.exp() - self.config.floor).clamp_min(0.0)
        magnitude_TF = (mel_TM @ self._inverse_FM.T).clamp_min(1e-7)
        target_TF = mel_TM @ self.filters_MF
        gram_FF = self.filters_MF.T @ self.filters_MF
        for _ in range(8):
            magnitude_TF = magnitude_TF * target_TF / (magnitude_TF @ gram_FF).clamp_min(1e-9)
        return magnitude_TF / self._scale


def _hz_to_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)
