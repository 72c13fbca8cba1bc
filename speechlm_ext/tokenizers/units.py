"""SSL units: the nearest of K centroids in the feature space of an encoder.

`KMeansUnits` is the base of all kinds. **encoder-kmeans** (`EncoderKMeans`) clusters the features of any encoder
(HuBERT, WavLM, Whisper, MFCC, …) without normalization, as fairseq and ESPnet do, so their centroids can be used.
**mfcc-kmeans** (:mod:`.mfcc_units`) normalizes its features and needs no model.

An artifact of `EncoderKMeans` holds the centroids and the encoder's description, not a model's weights: their sha256 is
compared when the model is loaded, which happens at the first recording (training on tokens never needs it). The path of
the model is not part of the fingerprint; where a model has moved, edit the path in ``tokenizer.json``.

Frames: ``ceil(n / samples per unit)``, the codec's rule, so units and codes of a recording pair up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechlm_ext.audio.waveform import check_wave
from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.counter_rng import sampled_rows
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.tokenizers.artifact import ArrayTokenizer
from speechlm_ext.tokenizers.base import register_tokenizer
from speechlm_ext.tokenizers.centroids import extract_features
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder
from speechlm_ext.utils.files.json_shape import Range, check_shape
from speechlm_ext.utils.options import check_positive


class KMeansUnits(ArrayTokenizer):
    """Units by K-Means over features: the nearest centroid in float64, ties to the lowest index.

    Args:
        centroids: float ``[K, F]``.
        sample_rate: Hz of the waveforms.
        frame_rate: units per second.
    """

    modality = "ssl"

    def __init__(self, centroids: torch.Tensor, sample_rate: int, frame_rate: float) -> None:
        self.centroids_KF = centroids.float().contiguous()
        self.vocab_sizes: tuple[int, ...] = (len(centroids),)
        self.sample_rate: int | None = sample_rate
        self.frame_rate: float | None = frame_rate

    @abstractmethod
    def features(self, wave: np.ndarray) -> torch.Tensor:
        """Features ``[T, F]`` of a checked waveform, in the space of the centroids."""

    @cached_property
    def _index(self) -> CentroidIndex:
        return CentroidIndex.build(self.centroids_KF)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Units of a float32 waveform ``[n]`` at ``sample_rate``: int32 ``[T, 1]``.

        Raises:
            AudioError: an empty or unusable waveform.
            TokenizerError: the encoder cannot be used.
        """
        labels = kmeans_assign(self.features(check_wave(x, "waveform for the SSL units")), self._index)
        units_T = torch.as_tensor(labels).numpy().astype(np.int32)
        if (units_T < 0).any():
            raise TokenizerError(
                f"{self.kind} units: the features of frame {int(np.argmax(units_T < 0))} are not finite; the model or "
                "the recording is damaged."
            )
        return units_T[:, None]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Units cannot be decoded to sound: always raises :class:`TokenizerError`."""
        raise TokenizerError(
            f"{self.kind} units have no speaker or pitch and cannot be decoded to sound; generate codec or codec_ssl "
            "frames instead."
        )

    def arrays(self) -> dict[str, torch.Tensor]:
        """See `ArrayTokenizer`."""
        return {"centroids": self.centroids_KF}


_SHAPE = {
    "encoder": str,
    "frames_per_token": Range(int, 1, 10**6),
    "sample_rate": Range(int, 1, 10**6),
    "frame_rate": float,
    "num_features": Range(int, 1, 10**6),
}


@dataclass(frozen=True)
class EncoderKMeansConfig:
    """Settings of a fit."""

    encoder: str = "mfcc"
    """``mfcc``, ``log-mel``, or ``hf:FOLDER_OR_HUB_NAME:LAYER``, e.g. ``hf:facebook/hubert-base-ls960:9``."""
    frames_per_token: int = 2
    """Frames of 10 ms that one unit covers: 2 is 50 Hz."""
    num_clusters: int = 200
    """Units."""
    max_fit_frames: int = 60000
    """Max. frames of the fit, drawn at random."""
    fit_iterations: int = 20
    """Lloyd steps."""

    def __post_init__(self) -> None:
        check_positive(self, "frames_per_token", "num_clusters", "max_fit_frames", "fit_iterations")
        EncoderSpec.parse(self.encoder)


class EncoderKMeans(KMeansUnits):
    """K-Means units over an encoder's features; see the module's text.

    Args:
        description: of the encoder, as `FeatureEncoder.describe` gives it.
        centroids: float ``[num_clusters, F]``.
        encoder: the loaded encoder, if there is one.

    Raises:
        TokenizerError: a description or centroids that do not fit.
    """

    kind = "encoder-kmeans"

    def __init__(
        self, description: Mapping[str, Any], centroids: torch.Tensor, encoder: FeatureEncoder | None = None
    ) -> None:
        try:
            check_shape(dict(description), {**_SHAPE, "...": Any})
        except ValueError as problem:
            raise TokenizerError(
                f"encoder-kmeans units: in the description of the encoder {problem}. Fit with `speechlm kmeans fit "
                "--encoder …`, which records it."
            ) from None
        num_features = int(description["num_features"])
        if centroids.dim() != 2 or centroids.shape[1] != num_features or not centroids.shape[0]:
            raise TokenizerError(
                f"encoder-kmeans units: expected centroids [K, {num_features}] for {description['encoder']}, got "
                f"{list(centroids.shape)}."
            )
        super().__init__(centroids, int(description["sample_rate"]), float(description["frame_rate"]))
        self.description = dict(description)
        self.spec = EncoderSpec.parse(str(description["encoder"]), int(description["frames_per_token"]))
        self._encoder = encoder

    @classmethod
    def fit(
        cls, waves: Iterable[np.ndarray], config: EncoderKMeansConfig | None = None, *, seed: int = 0
    ) -> EncoderKMeans:
        """Fit units to recordings.

        Args:
            waves: float32 ``[n]`` waveforms at 16 kHz; an iterator is read once.
            seed: of the choice of frames and of K-Means.

        Raises:
            ConfigError: units of a length that is no whole number of the encoder's frames.
            TokenizerError: the encoder cannot be loaded, or there are fewer frames than units.
            AudioError: a waveform that cannot be used.
        """
        config = config or EncoderKMeansConfig()
        encoder = averaged_encoder(config.encoder, config.frames_per_token)
        x_NF = extract_features(
            waves,
            encoder,
            frame_rate=encoder.frame_rate,
            num_clusters=config.num_clusters,
            setting="num_clusters",
        )
        if len(x_NF) > config.max_fit_frames:
            x_NF = x_NF[torch.from_numpy(sampled_rows(len(x_NF), config.max_fit_frames, seed))]
        # Not distributed: within a training job every process has the same recordings.
        kmeans = KMeans(
            config.num_clusters,
            max_iter=config.fit_iterations,
            random_state=seed,
            distributed=False,
            progress=False,
        ).fit(x_NF)
        return cls(encoder.describe(), kmeans.cluster_centers_, encoder)

    @classmethod
    def from_kmeans(cls, folder: str | Path, *, encoder: str | None = None) -> EncoderKMeans:
        """Units of an artifact that `speechlm kmeans fit` has written, or that was imported.

        Args:
            encoder: the encoder of its features, if the artifact does not record it (then without averaging frames),
                or if the model has moved.

        Raises:
            KMeansError: no such artifact, or a damaged one.
            TokenizerError: the encoder is neither recorded nor given, or another one is given.
        """
        kmeans = KMeans.load(folder)
        recorded, centroids = kmeans.features_, kmeans.cluster_centers_.cpu()
        # Imported units may come with notes of another form.
        is_described = set(recorded) >= set(_SHAPE)
        if encoder is None:
            if not is_described:
                raise TokenizerError(
                    f"{folder} does not say which encoder its features came from; name it with encoder, e.g. --encoder "
                    "hf:facebook/hubert-base-ls960:9."
                )
            return cls(recorded, centroids)
        frames_per_token = int(recorded["frames_per_token"]) if is_described else 1
        built = build_encoder(encoder, frames_per_token=frames_per_token)
        if is_described:
            _require_same(cls(recorded, centroids), built, compare_path=False)
        return cls(built.describe(), centroids, built)

    @property
    def encoder(self) -> FeatureEncoder:
        """The encoder, loaded at the first use.

        Raises:
            TokenizerError: it is missing, or its features differ from those that the centroids were fitted on.
        """
        if self._encoder is None:
            encoder = build_encoder(self.spec)
            _require_same(self, encoder)
            self._encoder = encoder
        return self._encoder

    def prepare(self) -> None:
        """Load the encoder now, so that a missing one is found before the first recording. Raises as `encoder`."""
        _ = self.encoder

    def features(self, wave: np.ndarray) -> torch.Tensor:
        """See `KMeansUnits`. Raises as `encoder`."""
        return self.encoder(wave)

    def settings(self) -> dict[str, Any]:
        """Description of the encoder."""
        return self.description

    def identity(self) -> dict[str, Any]:
        """Description of the encoder without the path of its model."""
        if self.spec.kind != "hf":
            return self.description
        return self.description | {"encoder": f"hf:{self.spec.layer}"}

    @classmethod
    def from_artifact(cls, settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> EncoderKMeans:
        """See `ArrayTokenizer`; the encoder is loaded at its first use."""
        return cls(settings, arrays["centroids"])


def _require_same(units: EncoderKMeans, encoder: FeatureEncoder, *, compare_path: bool = True) -> None:
    """Refuse an encoder whose features differ from those of the fit. Raises :class:`TokenizerError`."""
    expected, found = dict(units.description), encoder.describe()
    if not compare_path:
        for described, spec in ((expected, units.spec), (found, encoder.spec)):
            described["encoder"] = f"hf:…:{spec.layer}" if spec.kind == "hf" else spec.kind
    for key, value in expected.items():
        if found.get(key) != value:
            raise TokenizerError(
                f"encoder-kmeans units: {key} of the encoder {encoder.spec} is {found.get(key)!r}, but the centroids "
                f"were fitted on {value!r}. Use the model of the fit, or fit again."
            )


def averaged_encoder(encoder: str, frames_per_token: int) -> FeatureEncoder:
    """The encoder, averaged to one feature frame per ``frames_per_token`` frames of 10 ms."""
    built = build_encoder(encoder)
    count = built.frame_rate * frames_per_token / 100
    if count < 1 or count != int(count):
        raise ConfigError(
            f"encoder-kmeans units: {frames_per_token} frames of 10 ms are {count:g} frames of {encoder}, which has "
            f"{built.frame_rate:g} a second; that must be a whole number. Set frames_per_token to a multiple of "
            f"{round(100 / built.frame_rate)}."
        )
    return built if count == 1 else build_encoder(encoder, frames_per_token=int(count))


register_tokenizer(EncoderKMeans.kind, EncoderKMeans)
