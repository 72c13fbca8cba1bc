"""A fitted K-Means on disk: ``kmeans.safetensors`` (centroids, counts) and ``kmeans.json`` (their description).

The JSON is written last, so a folder with it is complete; it holds a sha256 over everything that determines units, so
edited or damaged files are refused. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from speechlm_ext.errors import KMeansError, foreign_errors
from speechlm_ext.utils.files.io import atomic_write_bytes, atomic_write_json
from speechlm_ext.utils.files.json_shape import SHA256, SIZE, check_shape
from speechlm_ext.utils.files.json_text import read_json
from speechlm_ext.utils.finite import require_finite

ARRAYS_NAME, JSON_NAME = "kmeans.safetensors", "kmeans.json"
FORMAT, VERSION = "speechlm-kmeans", 1


@dataclass
class Fitted:
    """The content of an artifact."""

    centers: Tensor
    """``[K, F]``."""
    counts: Tensor
    """``[K]`` rows of each cluster."""
    settings: dict[str, Any]
    """Of the fit, as JSON values."""
    features: dict[str, Any] = field(default_factory=dict)
    """Description of the features, as JSON values."""
    n_rows: int = 0
    n_dropped: int = 0
    n_iter: int = 0
    n_steps: int = 0
    inertia: float | None = None
    inertia_history: list[float] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """sha256 over centroids, counts and the description of the features."""
        return _fingerprint(self.tensors(), self.features)

    def tensors(self) -> dict[str, Tensor]:
        """Content of the safetensors file."""
        return {
            "cluster_centers": self.centers.detach().cpu().contiguous(),
            "counts": self.counts.detach().to(device="cpu", dtype=torch.int64).contiguous(),
        }


NUMBERS = ("n_rows", "n_dropped", "n_iter", "n_steps", "inertia", "inertia_history")


def json_features(features: Any) -> dict[str, Any]:
    """A copy in JSON's types. Raises :class:`KMeansError`: not JSON values."""
    try:
        return json.loads(json.dumps(features, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise KMeansError(
            f"K-Means: features must be JSON values that describe the features; {error}.", argument="features"
        ) from None


def write(folder: str | Path, fitted: Fitted) -> None:
    """Write a fitted model. Raises :class:`KMeansError`: a number is not finite, and nothing is written."""
    tensors = fitted.tensors()
    record = {
        "format": FORMAT,
        "version": VERSION,
        "n_clusters": int(fitted.centers.shape[0]),
        "n_features": int(fitted.centers.shape[1]),
        "dtype": str(fitted.centers.dtype).removeprefix("torch."),
        "features": fitted.features,
        "settings": fitted.settings,
        **{name: getattr(fitted, name) for name in NUMBERS},
        "sha256": fitted.fingerprint,
    }
    inertia = [value for value in (fitted.inertia, *fitted.inertia_history) if value is not None]
    numbers = {"inertia": torch.tensor(inertia, dtype=torch.float64)}
    hint = "The fitted rows are too large for their type; nothing was written."
    require_finite(tensors | numbers, KMeansError, f"K-Means was not saved to {folder}", hint)
    atomic_write_bytes(Path(folder) / ARRAYS_NAME, save_tensors(tensors))
    atomic_write_json(Path(folder) / JSON_NAME, record)


def read(folder: str | Path) -> Fitted:
    """Read a fitted model. Raises :class:`KMeansError`."""
    folder = Path(folder)
    record = read_record(folder)
    path = folder / ARRAYS_NAME
    with foreign_errors(
        KMeansError, f"{path} cannot be read as K-Means centroids", "Copy the whole folder again."
    ):
        tensors = load_tensors(path.read_bytes())
        centers, counts = tensors["cluster_centers"], tensors["counts"]
        computed = _fingerprint({"cluster_centers": centers, "counts": counts}, record["features"])
    expected = (record["n_clusters"], record["n_features"])
    if tuple(centers.shape) != expected or tuple(counts.shape) != expected[:1]:
        raise KMeansError(
            f"{path}: expected centroids {list(expected)} and counts [{expected[0]}] by its {JSON_NAME}, got "
            f"{list(centers.shape)} and {list(counts.shape)}; copy the whole folder again."
        )
    if computed != record["sha256"]:
        raise KMeansError(
            f"{folder}: content does not match its own sha256 ({computed[:12]}… against {record['sha256'][:12]}…); it "
            "was edited or damaged after saving, copy it again."
        )
    if not bool(centers.isfinite().all()) or bool((counts < 0).any()):
        raise KMeansError(f"{path}: centroids must be finite and counts 0 or more; fit again.")
    numbers = {name: record[name] for name in NUMBERS}
    return Fitted(centers, counts, record["settings"], record["features"], **numbers)


def read_record(folder: str | Path) -> dict[str, Any]:
    """``kmeans.json``, checked. Raises :class:`KMeansError`."""
    path = Path(folder) / JSON_NAME
    try:
        record = read_json(path, KMeansError, f"so it is not a K-Means description: {_WAY_OUT}")
    except FileNotFoundError:
        raise KMeansError(f"no {JSON_NAME} in {folder}; is this the folder of a fitted K-Means?") from None
    try:
        check_shape(record, dict)
        check_shape(record.get("format"), Literal["speechlm-kmeans"], "format")
        check_shape(record.get("version"), int, "version")
        if record["version"] == VERSION:
            check_shape(record, _SHAPE)
    except ValueError as problem:
        raise KMeansError(f"{path} is not a K-Means description ({problem}); {_WAY_OUT}") from None
    if record["version"] != VERSION:
        raise KMeansError(
            f"{path}: version {record['version']} is not {VERSION}; use the release that wrote it."
        )
    return record


_WAY_OUT = "save it again, or copy the whole folder again."
#: Content of ``kmeans.json``.
_SHAPE = {
    "format": str,
    "version": int,
    "n_clusters": SIZE,
    "n_features": SIZE,
    "dtype": str,
    "features": Any,
    "settings": dict,
    **{name: SIZE for name in ("n_rows", "n_dropped", "n_iter", "n_steps")},
    "inertia": float | None,
    "inertia_history": list[float],
    "sha256": SHA256,
}


def _fingerprint(tensors: dict[str, Tensor], features: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, features], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
