"""Features or units of recordings: the worker of the commands' ``RecordingPool``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from speechlm_ext.audio.files import audio_seconds
from speechlm_ext.data.manifest import Utterance
from speechlm_ext.data.recordings import read_wave
from speechlm_ext.errors import AudioError
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import SAMPLE_RATE, EncoderSpec


class FrameEncoder:
    """Encodes recordings to features or, with ``centroids_KF`` (float ``[K, F]``), to units."""

    def __init__(
        self, encoder: EncoderSpec, centroids_KF: np.ndarray | None, device: torch.device, resample: bool
    ) -> None:
        self._encoder = build_encoder(encoder, device=device)
        self._resample = resample
        self._index = None if centroids_KF is None else CentroidIndex.build(torch.from_numpy(centroids_KF))

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """float32 features ``[T, F]``, or int32 units ``[T]``. Raises :class:`SpeechLMError`."""
        wave, _ = read_wave(utterance, SAMPLE_RATE, self._resample)
        features_TF = self._encoder(wave)
        if self._index is None:
            return features_TF.numpy()
        labels = kmeans_assign(features_TF.to(self._index.centroids.dtype), self._index)
        return torch.as_tensor(labels).numpy()


def num_processes(num_workers: int | None, device: torch.device) -> int | None:
    """Processes of a :class:`~speechlm_ext.data.recordings.RecordingPool`; by default one alone for a GPU."""
    return 1 if num_workers is None and device.type != "cpu" else num_workers


def estimated_frames(utterances: Sequence[Utterance], frame_rate: float) -> int:
    """Upper estimate of the recordings' frames, by headers or the manifest. Raises :class:`AudioError`."""
    total = 0
    for u in utterances:
        assert u.audio is not None
        if u.start is not None and u.duration is not None:
            seconds = u.duration
        else:
            try:
                seconds = audio_seconds(u.audio) - (u.start or 0.0)
            except AudioError as error:
                raise AudioError(f"{u.where}: {error}") from None
        total += int(max(seconds, 0.0) * frame_rate) + 1
    return total
