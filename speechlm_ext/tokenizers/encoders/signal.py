"""``mfcc`` and ``log-mel``: features without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from speechlm_ext.tokenizers.encoders.mel import MelConfig, MelSpectrogram
from speechlm_ext.tokenizers.encoders.mfcc import MFCC, NUM_FEATURES
from speechlm_ext.tokenizers.encoders.spec import (
    SAMPLE_RATE,
    EncoderSpec,
    average_frames,
    check_encoder_wave,
    describe_encoder,
)
from speechlm_ext.utils.device import one_thread


class SignalEncoder:
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

    def describe(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return describe_encoder(self)
