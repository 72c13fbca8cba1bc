"""Feature encoders: a 16 kHz waveform → float32 features ``[T, F]`` at a stated frame rate.

A string names an encoder in settings, on the command line and in artifacts:

    mfcc                 13 MFCCs with first and second differences, 39 numbers, 100 frames/s
    log-mel              80 log-mel bands, 100 frames/s
    hf:NAME:LAYER        hidden state LAYER of a Hugging Face speech encoder, 50 frames/s for all common ones

``NAME`` is a folder or a name on the Hub. ``LAYER`` counts as transformers' ``hidden_states`` do: 0 is the input of the
first layer, L is the output of layer L. ``frames_per_token`` averages that many consecutive frames to one.

For every encoder a waveform of ``n`` samples has ``ceil(n / samples_per_frame)`` frames, the codec's rule, so units and
codes of one recording have equal lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import AudioError, ConfigError

SAMPLE_RATE = 16000
KINDS = "mfcc, log-mel or hf:FOLDER_OR_HUB_NAME:LAYER"


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder by name, and the number of its frames per feature frame."""

    kind: str
    """``mfcc``, ``log-mel`` or ``hf``."""
    name: str = ""
    """Of ``hf``: the model's folder or its name on the Hugging Face Hub."""
    layer: int = 0
    """Of ``hf``: index into the model's hidden states."""
    frames_per_token: int = 1
    """Consecutive frames averaged to one."""

    def __post_init__(self) -> None:
        if self.kind not in ("mfcc", "log-mel", "hf"):
            raise ConfigError(f"unknown feature encoder {self.kind!r}; expected {KINDS}.")
        if (self.kind == "hf") != bool(self.name) or self.layer < 0:
            raise ConfigError(f"feature encoder {self}: expected {KINDS}, with LAYER from 0.")
        if self.frames_per_token < 1:
            raise ConfigError(
                f"feature encoder {self}: frames_per_token must be at least 1, got {self.frames_per_token}.",
                argument="frames_per_token",
            )

    @classmethod
    def parse(cls, text: str, frames_per_token: int = 1) -> EncoderSpec:
        """Read ``mfcc``, ``log-mel`` or ``hf:NAME:LAYER``; the name may contain colons.

        Raises:
            ConfigError: anything else.
        """
        if not text.startswith("hf:"):
            return cls(text, frames_per_token=frames_per_token)
        name, colon, layer = text[3:].rpartition(":")
        if not colon or not name or not layer.isdecimal():
            raise ConfigError(
                f"feature encoder {text!r}: expected hf:FOLDER_OR_HUB_NAME:LAYER, e.g. hf:facebook/hubert-base-ls960:9."
            )
        return cls("hf", name, int(layer), frames_per_token)

    def __str__(self) -> str:
        return f"hf:{self.name}:{self.layer}" if self.kind == "hf" else self.kind


@runtime_checkable
class FeatureEncoder(Protocol):
    """Computes features of a 16 kHz waveform."""

    spec: EncoderSpec
    """Which encoder it is."""
    sample_rate: int
    """Hz of the waveforms: 16000."""
    frame_rate: float
    """Feature frames per second."""
    num_features: int
    """F."""

    def __call__(self, wave: np.ndarray, sample_rate: int | None = None) -> torch.Tensor:
        """Features of a waveform.

        Args:
            wave: float32 ``[n]`` in [-1, 1], n >= 1.
            sample_rate: its rate in Hz, to be checked.

        Returns:
            float32 ``[T, F]`` on the CPU with ``T = ceil(n / 16000 · frame_rate)``.

        Raises:
            AudioError: an unusable waveform, or one of another rate.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The encoder's record in artifacts, as JSON: equal descriptions mean equal features."""
        return {
            "encoder": str(self.spec),
            "frames_per_token": self.spec.frames_per_token,
            "sample_rate": self.sample_rate,
            "frame_rate": self.frame_rate,
            "num_features": self.num_features,
        }


def check_encoder_wave(wave: np.ndarray, sample_rate: int | None, encoder: FeatureEncoder) -> np.ndarray:
    """The waveform as contiguous float32 ``[n]``. Raises :class:`AudioError`: unusable, or of another rate."""
    if sample_rate is not None and sample_rate != encoder.sample_rate:
        raise AudioError(
            f"feature encoder {encoder.spec}: expected a waveform at {encoder.sample_rate} Hz, got {sample_rate} Hz; "
            f"resample it first, e.g. read_audio(path, {encoder.sample_rate})."
        )
    return check_wave(wave, f"waveform for {encoder.spec}")


def stack_frames(x_TF: torch.Tensor, count: int) -> torch.Tensor:
    """Join ``count`` consecutive frames: ``[ceil(T / count), count * F]``; the last frame fills up."""
    missing = -len(x_TF) % count
    if missing:
        x_TF = torch.cat([x_TF, x_TF[-1:].expand(missing, -1)])
    return x_TF.reshape(-1, count * x_TF.shape[1])


def average_frames(x_TF: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of ``count`` consecutive frames: ``[ceil(T / count), F]``; the last frame fills up."""
    return x_TF if count == 1 else stack_frames(x_TF, count).unflatten(1, (count, -1)).mean(1)
