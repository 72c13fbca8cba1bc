"""Decoding with torch's own transforms over the whole utterance, to compare streams with."""

from __future__ import annotations

import math

import numpy as np
import torch

from speechlm_ext.tokenizers import RVQKMeansCodec
from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram
from speechlm_ext.tokenizers.encoders.spec import stack_frames


def griffin_lim(
    magnitude_TF: torch.Tensor, mel: MelConfig, iterations: int, momentum: float, phase_TF: torch.Tensor
) -> torch.Tensor:
    """``[T * hop]`` samples by fast Griffin-Lim from the phase ``[T + 1, F]``."""
    setting = (mel.n_fft, mel.hop, mel.window, torch.hann_window(mel.window))
    length = len(magnitude_TF) * mel.hop
    # One more frame closes the last hop.
    M_FT = torch.cat([magnitude_TF, magnitude_TF[-1:]]).T
    angles, previous = torch.polar(torch.ones_like(M_FT), phase_TF.T), None
    for _ in range(iterations):
        wave = torch.istft(M_FT * angles, *setting, length=length)
        rebuilt = torch.stft(wave, *setting, pad_mode="constant", return_complex=True)[:, : M_FT.shape[1]]
        step = rebuilt if previous is None else rebuilt + momentum * (rebuilt - previous)
        angles, previous = torch.sgn(step), rebuilt
    return torch.istft(M_FT * angles, *setting, length=length).clamp(-1, 1)


def synthesize(mel: MelSpectrogram, log_mel_TM: torch.Tensor, iterations: int, momentum: float) -> np.ndarray:
    """Waveform of a log-mel spectrogram, from random phase."""
    magnitude_TF = mel.magnitude(log_mel_TM)
    generator = torch.Generator().manual_seed(0)
    phase_TF = torch.rand(len(magnitude_TF) + 1, magnitude_TF.shape[1], generator=generator) * 2 * math.pi
    return griffin_lim(magnitude_TF, mel.config, iterations, momentum, phase_TF).numpy()


def decode_whole(codec: RVQKMeansCodec, codes_TS: np.ndarray) -> np.ndarray:
    """Waveform of codes by Griffin-Lim over the whole utterance."""
    c = codec.config
    log_mel_TM = codec.log_mel(codes_TS)
    return synthesize(MelSpectrogram(c.mel), log_mel_TM, c.griffin_lim_iterations, c.griffin_lim_momentum)


def quantizer_input(codec: RVQKMeansCodec, wave: np.ndarray) -> torch.Tensor:
    """Log-mel ``[T * frames_per_token, num_mels]`` of a waveform, which ``codec.log_mel`` of its codes approximates."""
    log_mel_TM = MelSpectrogram(codec.config.mel).encode(wave)
    return stack_frames(log_mel_TM, codec.config.frames_per_token).reshape(-1, codec.config.mel.num_mels)
