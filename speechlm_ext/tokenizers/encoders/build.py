"""The encoder that a name stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram, one_thread
from speechlm_ext.tokenizers.encoders.mfcc import MFCC, NUM_FEATURES
from speechlm_ext.tokenizers.encoders.spec import (
    SAMPLE_RATE,
    EncoderSpec,
    FeatureEncoder,
    average_frames,
    check_encoder_wave,
    describe_spec,
)


def build_encoder(
    spec: EncoderSpec | str, *, frames_per_token: int = 1, device: str | torch.device = "cpu"
) -> FeatureEncoder:
    """Make the encoder that ``spec`` names.

    Args:
        spec: as a string (see the module's text) or parsed.
        frames_per_token: with a string, frames averaged to one.
        device: where a model runs; ``mfcc`` and ``log-mel`` always run on the CPU.

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


class SignalEncoder:
    """``mfcc`` or ``log-mel``: analysis without a model, 100 frames/s before averaging.

    One thread computes it, so the features do not depend on the number of cores.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.frame_rate = 100 / spec.frames_per_token
        self._analyse: Callable[[np.ndarray], torch.Tensor]
        if spec.kind == "mfcc":
            self._analyse, self.num_features = MFCC(SAMPLE_RATE), NUM_FEATURES
        else:
            config = MelConfig()
            self._analyse, self.num_features = MelSpectrogram(config).encode, config.num_mels

    def __call__(self, wave: np.ndarray, sample_rate: int | None = None) -> torch.Tensor:
        """See `FeatureEncoder`."""
        wave = check_encoder_wave(wave, sample_rate, self.spec)
        with one_thread():
            return average_frames(self._analyse(wave), self.spec.frames_per_token)

    def describe(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return describe_spec(self.spec, self.frame_rate, self.num_features)
