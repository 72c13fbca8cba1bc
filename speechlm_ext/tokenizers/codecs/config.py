"""Settings of the codec ``rvq-kmeans``."""

from __future__ import annotations

from dataclasses import dataclass, field

from speechlm_ext.errors import ConfigError
from speechlm_ext.tokenizers.encoders.mel import MelConfig
from speechlm_ext.utils.options import check_positive


@dataclass(frozen=True)
class RVQConfig:
    """Settings of the codec."""

    mel: MelConfig = field(default_factory=MelConfig)
    """The log-mel analysis."""
    frames_per_token: int = 2
    """Mel frames (10 ms) in one token frame: 2 is 50 Hz, 4 is 25 Hz."""
    num_codebooks: int = 8
    """Residual stages."""
    codebook_size: int = 256
    """Centroids of a stage."""
    beam: int = 4
    """Partial codes kept while encoding; 1 is greedy."""
    griffin_lim_iterations: int = 60
    """Steps of phase reconstruction."""
    griffin_lim_momentum: float = 0.99
    """Momentum of fast Griffin-Lim."""
    max_fit_frames: int = 30000
    """Max. token frames of the fit, drawn at random."""
    fit_iterations: int = 10
    """Lloyd steps of each stage."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "frames_per_token",
            "num_codebooks",
            "codebook_size",
            "beam",
            "max_fit_frames",
            "fit_iterations",
        )
        if self.griffin_lim_iterations < 0 or not 0 <= self.griffin_lim_momentum < 1:
            raise ConfigError(
                "rvq-kmeans codec: griffin_lim_iterations must be >= 0 and griffin_lim_momentum in [0, 1), "
                f"got {self.griffin_lim_iterations} and {self.griffin_lim_momentum}."
            )

    @property
    def num_features(self) -> int:
        """Values of a token frame: its stacked mel bands."""
        return self.frames_per_token * self.mel.num_mels

    @property
    def frame_samples(self) -> int:
        """Samples of a token frame."""
        return self.mel.hop * self.frames_per_token

    @property
    def frame_rate(self) -> float:
        """Token frames per second."""
        return self.mel.sample_rate / self.frame_samples
