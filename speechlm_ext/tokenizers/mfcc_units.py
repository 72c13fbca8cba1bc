"""``mfcc-kmeans``: units by K-Means over normalized MFCCs, the first iteration of HuBERT (Hsu et al., 2021).

``frames_per_token`` frames of 10 ms are averaged to one frame (2: 50 Hz), and each feature is normalized by the mean
and standard deviation of the fit's data. No model is needed, and the sampling rate is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.tokenizers.base import register_tokenizer
from speechlm_ext.tokenizers.centroids import extract_features, fit, sample_rows
from speechlm_ext.tokenizers.encoders.build import NUM_FEATURES, SignalEncoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec
from speechlm_ext.tokenizers.units import KMeansUnits
from speechlm_ext.utils.device import one_thread
from speechlm_ext.utils.files.json_shape import build
from speechlm_ext.utils.options import check_positive


@dataclass(frozen=True)
class SSLConfig:
    """Settings of ``mfcc-kmeans`` units."""

    sample_rate: int = 16000
    """Hz."""
    frames_per_token: int = 2
    """Frames of 10 ms averaged to one unit: 2 is 50 Hz."""
    num_clusters: int = 200
    """Units."""
    max_fit_frames: int = 60000
    """Max. frames of the fit, drawn at random."""
    fit_iterations: int = 20
    """Lloyd steps."""

    def __post_init__(self) -> None:
        check_positive(self, "frames_per_token", "num_clusters", "max_fit_frames", "fit_iterations")
        if self.sample_rate < 8000 or self.sample_rate % 100:
            raise ConfigError(
                "mfcc-kmeans units: sample_rate must be a multiple of 100 Hz and at least 8000 Hz, got "
                f"{self.sample_rate}."
            )


class MFCCKMeans(KMeansUnits):
    """K-Means units over normalized MFCCs; see the module's text.

    Args:
        config: settings.
        mean, scale: float32 ``[39]``, normalization of the features.
        centroids: float32 ``[num_clusters, 39]`` in normalized space.

    Raises:
        TokenizerError: arrays of other shapes.
    """

    kind = "mfcc-kmeans"

    def __init__(
        self, config: SSLConfig, mean: torch.Tensor, scale: torch.Tensor, centroids: torch.Tensor
    ) -> None:
        shapes = [tuple(mean.shape), tuple(scale.shape), tuple(centroids.shape)]
        if shapes != [(NUM_FEATURES,), (NUM_FEATURES,), (config.num_clusters, NUM_FEATURES)]:
            raise TokenizerError(
                f"mfcc-kmeans units: expected mean and scale [{NUM_FEATURES}] and centroids "
                f"[{config.num_clusters}, {NUM_FEATURES}], got {shapes}."
            )
        self._encoder = _encoder(config)
        super().__init__(centroids, config.sample_rate, self._encoder.frame_rate)
        self.config = config
        self.mean_F, self.scale_F = mean.float().contiguous(), scale.float().contiguous()

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
        encoder = _encoder(config)
        x_NF = extract_features(
            waves,
            encoder,
            frame_rate=encoder.frame_rate,
            num_clusters=config.num_clusters,
            setting="num_clusters",
        )
        x_NF = sample_rows(x_NF, config.max_fit_frames, seed)
        mean_F = x_NF.mean(0)
        scale_F = x_NF.std(0, correction=0).clamp_min(1e-5)
        normalized_NF = (x_NF - mean_F) / scale_F
        fitted = fit(normalized_NF, config.num_clusters, seed=seed, iterations=config.fit_iterations)
        return cls(config, mean_F, scale_F, fitted.cluster_centers_)

    def features(self, wave: np.ndarray) -> torch.Tensor:
        """See `KMeansUnits`: normalized MFCCs."""
        with one_thread():
            return (self._encoder(wave) - self.mean_F) / self.scale_F

    def settings(self) -> dict[str, Any]:
        """Settings of the fit."""
        return asdict(self.config)

    def arrays(self) -> dict[str, torch.Tensor]:
        """See `ArrayTokenizer`."""
        return {"mean": self.mean_F, "scale": self.scale_F, "centroids": self.centroids_KF}

    @classmethod
    def from_artifact(cls, settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> MFCCKMeans:
        """See `ArrayTokenizer`."""
        config = build(SSLConfig, settings, "config")
        return cls(config, arrays["mean"], arrays["scale"], arrays["centroids"])


def _encoder(config: SSLConfig) -> SignalEncoder:
    return SignalEncoder(EncoderSpec("mfcc", frames_per_token=config.frames_per_token), config.sample_rate)


register_tokenizer(MFCCKMeans.kind, MFCCKMeans)
