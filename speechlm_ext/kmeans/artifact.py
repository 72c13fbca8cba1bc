"""A fitted K-Means on disk: ``kmeans.safetensors`` (centroids, counts) and ``kmeans.json`` (all that describes them).

The JSON is written last, so a folder with it is complete; it holds a sha256 over everything that decides units, so what
was edited or damaged is refused. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from speechlm_ext.errors import KMeansError, foreign_errors
from speechlm_ext.utils.finite import require_finite
from speechlm_ext.utils.files.io import atomic_write_bytes, atomic_write_json
from speechlm_ext.utils.files.json_shape import SHA256, SIZE, check_shape
from speechlm_ext.utils.files.json_text import read_json

if TYPE_CHECKING:
    from speechlm_ext.kmeans.estimator import KMeans

ARRAYS_NAME, JSON_NAME = "kmeans.safetensors", "kmeans.json"
FORMAT, VERSION = "speechlm-kmeans", 1


def fingerprint(model: KMeans) -> str:
    """sha256 over centroids, counts and the description of the features."""
    return _fingerprint(_tensors(model), model.features_)


def write(folder: str | Path, model: KMeans) -> None:
    """Write a fitted model.

    Raises:
        KMeansError: features that are not JSON, or a number that is not finite; what the folder holds is untouched.
        StorageError: it cannot be written.
    """
    try:
        features = json.loads(json.dumps(model.features_, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise KMeansError(
            f"K-Means: features should be JSON values that say what made the features; {error}."
        ) from None
    model.features_ = features
    tensors = _tensors(model)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "n_clusters": int(tensors["cluster_centers"].shape[0]),
        "n_features": int(tensors["cluster_centers"].shape[1]),
        "dtype": str(tensors["cluster_centers"].dtype).removeprefix("torch."),
        "features": features,
        "settings": model.settings.record(),
        "n_rows": model.n_rows_,
        "n_dropped": model.n_dropped_,
        "n_iter": model.n_iter_,
        "n_steps": model.n_steps_,
        "inertia": model.inertia_,
        "inertia_history": model.inertia_history_,
        "sha256": _fingerprint(tensors, features),
    }
    inertia = [value for value in (model.inertia_, *model.inertia_history_) if value is not None]
    numbers = {"inertia": torch.tensor(inertia, dtype=torch.float64)}
    hint = "The rows that it was fitted on are too large for their type; nothing was written."
    require_finite(tensors | numbers, KMeansError, f"K-Means was not saved to {folder}", hint)
    atomic_write_bytes(Path(folder) / ARRAYS_NAME, save_tensors(tensors))
    atomic_write_json(Path(folder) / JSON_NAME, record)


def read(folder: str | Path, cls: type[KMeans]) -> KMeans:
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
    try:
        settings = dict(record["settings"])
        if str(settings["init"]).startswith("array "):
            settings["init"] = centers  # the array itself is not kept; its hash is in the record
        with foreign_errors(KMeansError, "settings", "Expected are those of KMeans."):
            model = cls(**settings)
        names = ("n_rows", "n_dropped", "n_iter", "n_steps", "inertia", "inertia_history")
        model._adopt(centers, counts, **{name: record[name] for name in names})
    except (KeyError, KMeansError) as error:
        raise KMeansError(
            f"{folder / JSON_NAME}: not a K-Means description ({str(error)[:300]}); save it again."
        ) from None
    model.features_ = record["features"]
    return model


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
#: What ``kmeans.json`` holds.
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


def _tensors(model: KMeans) -> dict[str, Tensor]:
    return {
        "cluster_centers": model.cluster_centers_.detach().cpu().contiguous(),
        "counts": model.counts_.detach().to(device="cpu", dtype=torch.int64).contiguous(),
    }


def _fingerprint(tensors: dict[str, Tensor], features: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, features], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
