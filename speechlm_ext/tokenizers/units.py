"""``encoder-kmeans``: units by K-Means over the features of any encoder: HuBERT, WavLM, Whisper, MFCC, …

The nearest of ``num_clusters`` centroids in the encoder's own feature space is the unit, certified to be the float64
argmin. Features are not normalised, as fairseq's and ESPnet's models expect it; so their centroids can be used.

The artefact holds the centroids and the encoder's description. A model's weights are not copied: their sha256 is
recorded and compared when the model is loaded, which happens at the first recording (training on tokens never needs
it). The place of the model is not part of the fingerprint: where it has moved, its new place can be written into
``tokenizer.json``.

Frames: ``ceil(n / samples per unit)``, the codec's rule, so codec_ssl frames match.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechlm_ext.audio.files import check_wave
from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.tokenizers import base
from speechlm_ext.tokenizers.encoders.build import build_encoder
from speechlm_ext.tokenizers.encoders.spec import EncoderSpec, FeatureEncoder
from speechlm_ext.utils.files.json_shape import Range, check_shape

_SHAPE = {
    "encoder": str,
    "frames_per_token": Range(int, 1, 10**6),
    "sample_rate": Range(int, 1, 10**6),
    "frame_rate": float,
    "num_features": Range(int, 1, 10**6),
}
_FIELDS = set(_SHAPE)


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
    """Frames that the fit uses at most, drawn at random."""
    fit_iterations: int = 20
    """Lloyd steps."""

    def __post_init__(self) -> None:
        for name in ("frames_per_token", "num_clusters", "max_fit_frames", "fit_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"encoder-kmeans units: {name} must be at least 1, got {getattr(self, name)}."
                )
        EncoderSpec.parse(self.encoder)


class EncoderKMeans:
    """K-Means units over an encoder's features; see the module's text.

    Args:
        description: of the encoder, as `FeatureEncoder.describe` gives it.
        centroids: float ``[num_clusters, F]``.
        encoder: the encoder itself where it is loaded already.

    Raises:
        TokenizerError: a description or centroids that do not fit.
    """

    kind = "encoder-kmeans"
    modality = "ssl"

    def __init__(
        self, description: Mapping[str, Any], centroids: torch.Tensor, encoder: FeatureEncoder | None = None
    ) -> None:
        missing = sorted(_FIELDS - set(description))
        if missing:
            raise TokenizerError(
                f"encoder-kmeans units: the description of the encoder lacks {missing[0]!r}; it says which "
                "features the centroids belong to. Fit with `speechlm kmeans fit --encoder …`."
            )
        try:
            check_shape({name: description[name] for name in _FIELDS}, _SHAPE)
        except ValueError as problem:
            raise TokenizerError(
                f"encoder-kmeans units: in the description of the encoder {problem}."
            ) from None
        width = int(description["num_features"])
        if centroids.dim() != 2 or centroids.shape[1] != width or not centroids.shape[0]:
            raise TokenizerError(
                f"encoder-kmeans units: expected centroids [K, {width}] for {description['encoder']}, got "
                f"{list(centroids.shape)}."
            )
        self.description = dict(description)
        self.spec = EncoderSpec.parse(str(description["encoder"]), int(description["frames_per_token"]))
        self.centroids_KF = centroids.float().contiguous()
        self.vocab_sizes: tuple[int, ...] = (len(centroids),)
        self.sample_rate: int | None = int(description["sample_rate"])
        self.frame_rate: float | None = float(description["frame_rate"])
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
            ConfigError: units of a length that the encoder's frames do not fill.
            TokenizerError: the encoder cannot be loaded, or there are fewer frames than units.
            AudioError: a waveform that cannot be used.
        """
        from speechlm_ext.kmeans import KMeans
        from speechlm_ext.kmeans.features.sampling import sampled_rows

        config = config or EncoderKMeansConfig()
        encoder = averaged_encoder(config.encoder, config.frames_per_token)
        parts = [
            encoder(check_wave(wave, f"waveform {index} of the units' fit"))
            for index, wave in enumerate(waves)
        ]
        x_NF = torch.cat(parts) if parts else torch.zeros(0, encoder.num_features)
        if len(x_NF) < config.num_clusters:
            raise TokenizerError(
                f"encoder-kmeans units: {config.num_clusters} units need at least as many frames, got {len(x_NF)} "
                f"({len(x_NF) / encoder.frame_rate:.1f} s of audio). Give more audio to fit on, or set num_clusters to "
                f"at most {len(x_NF)}."
            )
        if len(x_NF) > config.max_fit_frames:
            x_NF = x_NF[torch.from_numpy(sampled_rows(len(x_NF), config.max_fit_frames, seed))]
        # Within a training job every process has the same recordings.
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
        """Take the units of an artefact that `speechlm kmeans fit` has written, or that was imported.

        Args:
            encoder: the encoder that made its features, where the artefact does not say so (then without averaging
                frames), or where its model lies in another place now.

        Raises:
            KMeansError: no such artefact, or a damaged one.
            TokenizerError: it does not say which encoder its features came from and none was given, or another one was.
        """
        from speechlm_ext.kmeans import KMeans

        kmeans = KMeans.load(folder)
        recorded, centroids = kmeans.features_, kmeans.cluster_centers_.cpu()
        # Imported units may come with notes of another form.
        is_described = set(recorded) >= _FIELDS
        if encoder is None:
            if not is_described:
                raise TokenizerError(
                    f"{folder} does not say which encoder its features came from; name it with encoder, e.g. --encoder "
                    "hf:facebook/hubert-base-ls960:9."
                )
            return cls(recorded, centroids)
        count = int(recorded["frames_per_token"]) if is_described else 1
        built = build_encoder(encoder, frames_per_token=count)
        if is_described:
            _require_same(cls(recorded, centroids), built, place_counts=False)
        return cls(built.describe(), centroids, built)

    @property
    def encoder(self) -> FeatureEncoder:
        """The encoder, loaded at the first use.

        Raises:
            TokenizerError: it is missing, or gives other features than the centroids were fitted on.
        """
        if self._encoder is None:
            encoder = build_encoder(self.spec)
            _require_same(self, encoder)
            self._encoder = encoder
        return self._encoder

    def prepare(self) -> None:
        """Load the encoder now, so that a missing one is found before the first recording. Raises as `encoder`."""
        _ = self.encoder

    @cached_property
    def _index(self) -> CentroidIndex:
        return CentroidIndex.build(self.centroids_KF)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Units of a float32 waveform ``[n]`` at 16 kHz: int32 ``[T, 1]``.

        Raises:
            AudioError: an empty or unusable waveform.
            TokenizerError: the encoder cannot be used, see `encoder`.
        """
        labels = kmeans_assign(self.encoder(check_wave(x, "waveform for the SSL units")), self._index)
        units_T = torch.as_tensor(labels).numpy().astype(np.int32)
        if (units_T < 0).any():
            frame = int(np.argmax(units_T < 0))
            raise TokenizerError(
                f"encoder-kmeans units: {self.spec} gave features that are not finite at frame {frame}; the model or "
                "the recording is damaged."
            )
        return units_T[:, None]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Units cannot become sound: always raises :class:`TokenizerError`."""
        raise TokenizerError(
            "encoder-kmeans units hold no voice and cannot be decoded to sound; generate codec or codec_ssl frames "
            "instead."
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over centroids, weights and settings; the model's place does not count."""
        config = dict(self.description)
        if self.spec.kind == "hf":
            config["encoder"] = f"hf:{self.spec.layer}"
        return base.fingerprint(self.kind, config, base.array_bytes(self._arrays()))

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {"centroids": self.centroids_KF}

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``arrays.safetensors`` into ``folder``."""
        base.write_arrays(folder, self.kind, self.description, self.fingerprint, self._arrays())

    @classmethod
    def load(cls, folder: str | Path) -> EncoderKMeans:
        """Read what :meth:`save` wrote; the encoder is loaded at its first use. Raises :class:`TokenizerError`."""
        record, arrays = base.read_config(folder), base.read_arrays(folder)
        with base.artefact_errors(folder, "encoder-kmeans units"):
            units = cls(record["config"], arrays["centroids"])
        base.require_fingerprint(folder, record["sha256"], units.fingerprint)
        return units


def _require_same(units: EncoderKMeans, encoder: FeatureEncoder, *, place_counts: bool = True) -> None:
    """Refuse an encoder that gives other features than the centroids were fitted on. Raises :class:`TokenizerError`."""
    expected, found = dict(units.description), encoder.describe()
    if not place_counts:
        for described, spec in ((expected, units.spec), (found, encoder.spec)):
            described["encoder"] = f"hf:…:{spec.layer}" if spec.kind == "hf" else spec.kind
    for key, value in expected.items():
        if found.get(key) != value:
            raise TokenizerError(
                f"encoder-kmeans units: {key} of the encoder {encoder.spec} is {found.get(key)!r}, but the centroids "
                f"were fitted on {value!r}; its features mean something else. Use the model that the units were fitted "
                "with, or fit again."
            )


def averaged_encoder(encoder: str, frames_per_token: int) -> FeatureEncoder:
    """The encoder with so many of its frames averaged that one unit covers ``frames_per_token`` frames of 10 ms.

    Raises:
        ConfigError: they are no whole number of the encoder's frames.
        TokenizerError: the encoder cannot be loaded.
    """
    built = build_encoder(encoder)
    count = built.frame_rate * frames_per_token / 100
    if count < 1 or count != int(count):
        raise ConfigError(
            f"encoder-kmeans units: {frames_per_token} frames of 10 ms are {count:g} frames of {encoder}, which has "
            f"{built.frame_rate:g} a second; they must be a whole number. Set frames_per_token to a multiple of "
            f"{round(100 / built.frame_rate)}."
        )
    return built if count == 1 else build_encoder(encoder, frames_per_token=int(count))


base.register_tokenizer(EncoderKMeans.kind, EncoderKMeans)
