"""Log-mel analysis and its inversion: what the codec and the SSL units hear, and how codes become sound
again.

Analysis: magnitude STFT (Hann window of 40 ms, hop 10 ms), triangular mel bands (HTK scale), ``log(mel +
floor)``.
The floor is high on purpose: detail far below the speech level is inaudible, yet in logarithms it varies as
much as the speech does and would take most of the codes.

Inversion: bands → magnitudes with the pseudo-inverse of the filterbank and a few multiplicative least-squares
steps that keep them positive, then fast Griffin-Lim (Perraudin, Balazs and Søndergaard, 2013) for the phase: here over
the whole utterance, in ``online_phase`` block by block.

Frames: a waveform of ``n`` samples has ``ceil(n / hop)`` frames; frame ``i`` is centred on sample ``i *
hop``.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from speechlm_ext.errors import ConfigError


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
                f"mel bands need 0 <= f_min < f_max <= {self.sample_rate / 2:g} Hz, num_mels >= 1 and floor "
                f"> 0, got f_min {self.f_min}, f_max {self.f_max}, num_mels {self.num_mels}, floor "
                f"{self.floor}."
            )


class MelSpectrogram:
    """Log-mel analysis and synthesis on the CPU for one :class:`MelConfig`."""

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

    def num_frames(self, num_samples: int) -> int:
        """Frames of a waveform with ``num_samples`` samples."""
        return math.ceil(num_samples / self.config.hop)

    def encode(self, wave: np.ndarray) -> torch.Tensor:
        """Analyse float32 ``wave [n]`` (n >= 1); returns log-mel ``[ceil(n / hop), num_mels]`` float32."""
        with one_thread():
            return self._encode(wave)

    def _encode(self, wave: np.ndarray) -> torch.Tensor:
        num_frames = self.num_frames(len(wave))
        padded = torch.zeros(num_frames * self.config.hop)
        padded[: len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        spectrum_TF = self._stft(padded)[:num_frames]
        # Faster than abs(), which guards against overflow that audio in [-1, 1] cannot cause.
        magnitude_TF = (
            spectrum_TF.real.square().addcmul_(spectrum_TF.imag, spectrum_TF.imag).sqrt_() * self._scale
        )
        return torch.log(magnitude_TF @ self.filters_MF.T + self.config.floor)

    def decode(
        self, log_mel_TM: torch.Tensor, *, iterations: int, momentum: float, seed: int = 0
    ) -> np.ndarray:
        """Synthesise a waveform of ``T * hop`` samples, float32 in [-1, 1], from log-mel ``[T, num_mels]``.

        Args:
            iterations: Griffin-Lim steps.
            momentum: of fast Griffin-Lim; 0 is the classic one.
            seed: of the starting phase; the result is a function of the input and this seed.
        """
        with one_thread():
            return self._decode(log_mel_TM, iterations, momentum, seed)

    def _decode(self, log_mel_TM: torch.Tensor, iterations: int, momentum: float, seed: int) -> np.ndarray:
        magnitude_TF = self.magnitude(log_mel_TM)
        length = log_mel_TM.shape[0] * self.config.hop
        # One more frame closes the last hop; istft needs it to reach ``length``.
        magnitude_TF = torch.cat([magnitude_TF, magnitude_TF[-1:]])
        generator = torch.Generator().manual_seed(seed)
        phase = torch.rand(magnitude_TF.shape, generator=generator) * (2 * math.pi)
        angles = torch.polar(torch.ones_like(phase), phase)
        previous: torch.Tensor | None = None
        for _ in range(iterations):
            rebuilt = self._stft(self._istft(magnitude_TF * angles, length))
            step = rebuilt if previous is None else rebuilt + momentum * (rebuilt - previous)
            angles = torch.sgn(step)  # unit modulus; 0 stays 0
            previous = rebuilt
        return self._istft(magnitude_TF * angles, length).clamp(-1, 1).numpy()

    def magnitude(self, log_mel_TM: torch.Tensor, steps: int = 8) -> torch.Tensor:
        """Estimate STFT magnitudes ``[T, n_fft / 2 + 1]`` (in STFT units, >= 0) whose mel bands are the given
        ones."""
        mel_TM = (log_mel_TM.exp() - self.config.floor).clamp_min(0.0)
        start_TF = (mel_TM @ self._inverse_FM.T).clamp_min(1e-7)
        target_TF = mel_TM @ self.filters_MF
        gram_FF = self.filters_MF.T @ self.filters_MF
        for _ in range(steps):
            start_TF = start_TF * target_TF / (start_TF @ gram_FF).clamp_min(1e-9)
        return start_TF / self._scale

    def _stft(self, wave: torch.Tensor) -> torch.Tensor:
        c = self.config
        return torch.stft(
            wave,
            c.n_fft,
            c.hop,
            c.window,
            self._window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        ).T

    def _istft(self, spectrum_TF: torch.Tensor, length: int) -> torch.Tensor:
        c = self.config
        return torch.istft(spectrum_TF.T, c.n_fft, c.hop, c.window, self._window, center=True, length=length)


class _OneThread:
    """Run torch on one thread inside: its FFTs of short frames are up to 30 times slower on several.

    The thread count is the process's, so overlapping uses are counted: the first sets it, the last restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._threads = 1

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                torch.set_num_threads(self._threads)


_ONE_THREAD = _OneThread()


def one_thread() -> _OneThread:
    """The shared guard; see :class:`_OneThread`."""
    return _ONE_THREAD


def _hz_to_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)
