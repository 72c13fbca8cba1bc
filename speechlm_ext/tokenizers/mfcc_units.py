"""``mfcc-kmeans``: discrete units of speech content by K-Means over MFCCs, the first iteration of HuBERT.

``frames_per_token`` frames of 10 ms are averaged to one unit frame (2: 50 Hz), each feature is normalised by
the mean and deviation of the fit's data, and the nearest of ``num_clusters`` centroids is the unit. Units say
what is heard, not
how: they cannot be decoded to sound.

Frames: ``ceil(n / (hop * frames_per_token))``, the same rule as the codec's, so codec_ssl frames match.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from speechlm_ext.audio.files import check_wave
from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.tokenizers import base
from speechlm_ext.tokenizers.centroids import assign, fit
from speechlm_ext.tokenizers.encoders.mel import one_thread
from speechlm_ext.tokenizers.encoders.mfcc import MFCC, NUM_FEATURES
from speechlm_ext.tokenizers.encoders.spec import average_frames
from speechlm_ext.utils.files.json_shape import build


@dataclass(frozen=True)
class SSLConfig:
    """Settings of the units."""

    sample_rate: int = 16000
    """Hz."""
    frames_per_token: int = 2
    """Frames of 10 ms averaged to one unit: 2 is 50 Hz."""
    num_clusters: int = 200
    """Units."""
    max_fit_frames: int = 60000
    """Frames that the fit uses at most, drawn at random."""
    fit_iterations: int = 20
    """Lloyd steps."""

    def __post_init__(self) -> None:
        for name in ("frames_per_token", "num_clusters", "max_fit_frames", "fit_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mfcc-kmeans units: {name} must be at least 1, got {getattr(self, name)}.")
        if self.sample_rate < 8000 or self.sample_rate % 100:
            raise ConfigError(
                f"mfcc-kmeans units: sample_rate must be a multiple of 100 Hz from 8000 Hz, got "
                f"{self.sample_rate}."
            )


class MFCCKMeans:
    """K-Means units over MFCCs; see the module's text.

    Args:
        config: settings.
        mean, scale: float32 ``[39]``, normalisation of the features.
        centroids: float32 ``[num_clusters, 39]`` in normalised space.
    """

    kind = "mfcc-kmeans"
    modality = "ssl"

    def __init__(
        self, config: SSLConfig, mean: torch.Tensor, scale: torch.Tensor, centroids: torch.Tensor
    ) -> None:
        shapes = [tuple(mean.shape), tuple(scale.shape), tuple(centroids.shape)]
        if shapes != [(NUM_FEATURES,), (NUM_FEATURES,), (config.num_clusters, NUM_FEATURES)]:
            raise TokenizerError(
                f"mfcc-kmeans units: expected mean and scale [{NUM_FEATURES}] and centroids "
                f"[{config.num_clusters}, {NUM_FEATURES}], got {shapes}."
            )
        self.config = config
        self.mean_F, self.scale_F = mean.float().contiguous(), scale.float().contiguous()
        self.centroids_KF = centroids.float().contiguous()
        self.vocab_sizes: tuple[int, ...] = (config.num_clusters,)
        self.sample_rate: int | None = config.sample_rate
        self.frame_rate: float | None = 100 / config.frames_per_token
        self._mfcc = MFCC(config.sample_rate)

    @classmethod
    def fit(
        cls, waves: Iterable[np.ndarray], config: SSLConfig | None = None, *, seed: int = 0
    ) -> MFCCKMeans:
        """Fit units to recordings.

        Args:
            waves: float32 ``[n]`` waveforms at ``config.sample_rate``; an iterator is read once.
            seed: of the choice of frames and of K-Means.

        Raises:
            TokenizerError: fewer frames than units.
            AudioError: a waveform that cannot be used.
        """
        config = config or SSLConfig()
        mfcc = MFCC(config.sample_rate)
        parts = [
            average_frames(
                mfcc(check_wave(wave, f"waveform {index} of the units' fit")), config.frames_per_token
            )
            for index, wave in enumerate(waves)
        ]
        x_NF = torch.cat(parts) if parts else torch.zeros(0, NUM_FEATURES)
        if len(x_NF) > config.max_fit_frames:
            order = torch.randperm(len(x_NF), generator=torch.Generator().manual_seed(seed))
            x_NF = x_NF[order[: config.max_fit_frames]]
        if len(x_NF) < config.num_clusters:
            raise TokenizerError(
                f"mfcc-kmeans units: {config.num_clusters} units need at least as many frames, got "
                f"{len(x_NF)} ({len(x_NF) * config.frames_per_token / 100:.1f} s of audio). Give more audio "
                f"to fit on, or set num_clusters to at most {len(x_NF)}."
            )
        mean_F = x_NF.mean(0)
        scale_F = x_NF.std(0, correction=0).clamp_min(1e-5)
        found = fit(
            (x_NF - mean_F) / scale_F,
            config.num_clusters,
            seed=seed,
            iterations=config.fit_iterations,
            what="mfcc-kmeans units",
        )
        return cls(config, mean_F, scale_F, found.centroids_KF)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Units of a float32 waveform ``[n]`` at ``sample_rate``: int32 ``[T, 1]``.

        Raises:
            AudioError: an empty or unusable waveform.
        """
        wave = check_wave(x, "waveform for the SSL units")
        with one_thread():
            features_TF = average_frames(self._mfcc(wave), self.config.frames_per_token)
            units_T = assign((features_TF - self.mean_F) / self.scale_F, self.centroids_KF)
        return units_T.numpy().astype(np.int32)[:, None]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Units cannot become sound: always raises :class:`TokenizerError`."""
        raise TokenizerError(
            "mfcc-kmeans units hold no voice and cannot be decoded to sound; generate codec or codec_ssl "
            "frames instead."
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over settings and centroids."""
        return base.fingerprint(self.kind, asdict(self.config), base.array_bytes(self._arrays()))

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean_F, "scale": self.scale_F, "centroids": self.centroids_KF}

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``arrays.safetensors`` into ``folder``."""
        base.write_arrays(folder, self.kind, asdict(self.config), self.fingerprint, self._arrays())

    @classmethod
    def load(cls, folder: str | Path) -> MFCCKMeans:
        """Read what :meth:`save` wrote. Raises :class:`TokenizerError`."""
        record, arrays = base.read_config(folder), base.read_arrays(folder)
        with base.artefact_errors(folder, "mfcc-kmeans units"):
            config = build(SSLConfig, record["config"], "config")
            units = cls(config, arrays["mean"], arrays["scale"], arrays["centroids"])
        base.require_fingerprint(folder, record["sha256"], units.fingerprint)
        return units


base.register_tokenizer(MFCCKMeans.kind, MFCCKMeans)
