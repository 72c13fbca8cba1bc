"""Folders of K-Means for the damage tests: how to make a good one of each kind, and how to read all of it."""

from __future__ import annotations

import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from python_tests.damage.harness import plain
from speechlm_ext.kmeans import KMeans
from speechlm_ext.kmeans.features.sources import open_source
from speechlm_ext.units.assign import AssignConfig, run_assign
from speechlm_ext.units.fit import FitConfig, run_fit

# ---- K-Means ---------------------------------------------------------------------------------------------------
WAVE = (0.3 * np.sin(np.arange(8000) * 0.05 * (1 + np.arange(8000) / 8000))).astype(np.float32)


def features(num_rows: int = 300) -> torch.Tensor:
    return torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))


def make_kmeans(folder: Path) -> None:
    kmeans = KMeans(6, max_iter=3, progress=False, distributed=False)
    kmeans.fit(features())
    kmeans.save(folder, features={"encoder": "mfcc", "frame_rate": 100.0})


def read_kmeans(folder: Path) -> Any:
    from speechlm_ext.units.inspect import describe_units

    kmeans = KMeans.load(folder)
    describe_units(kmeans, folder)
    return kmeans.fingerprint, plain(kmeans.predict(features())), kmeans.features_


def make_kmeans_checkpoint(folder: Path) -> None:
    KMeans(6, max_iter=2, tol=0, n_init=2, progress=False, distributed=False).fit(
        features(), checkpoint=folder
    )


def read_kmeans_checkpoint(folder: Path) -> Any:
    kmeans = KMeans(6, max_iter=2, tol=0, n_init=2, progress=False, distributed=False)
    kmeans.fit(features(), checkpoint=folder)
    return plain(kmeans.cluster_centers_), kmeans.inertia_history_


def make_feature_shards(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    x = features().numpy()
    np.save(folder / "a.npy", x[:100])
    np.save(folder / "b.npy", x[100:200].astype(np.float64))
    pq.write_table(pa.table({"features": list(x[200:])}), folder / "c.parquet")


def read_feature_shards(folder: Path) -> Any:
    source = open_source([folder / name for name in ("a.npy", "b.npy", "c.parquet")])
    return [plain(block) for _, block in source.blocks(0, source.num_rows, 64)]


@lru_cache
def recordings() -> Path:
    """A folder of three short recordings."""
    from speechlm_ext.audio.files import write_wav

    folder = Path(tempfile.mkdtemp())
    for n in range(3):
        write_wav(folder / f"r{n}.wav", np.roll(WAVE, 500 * n), 16000)
    return folder


def _fit_config(folder: Path) -> FitConfig:
    return FitConfig(
        output_dir=str(folder), audio=str(recordings()), encoder="mfcc", n_clusters=4, max_iter=3, num_workers=1,
        keep_features=True, device="cpu")  # fmt: skip


def _fit(folder: Path) -> None:
    """Fit without the picture, which nothing reads and takes most of the time."""
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        run_fit(_fit_config(folder))


def make_fit_folder(folder: Path) -> None:
    """A fit that was stopped after its features."""
    _fit(folder)
    for name in ("kmeans.json", "kmeans.safetensors"):
        (folder / name).unlink()


def read_fit_folder(folder: Path) -> Any:
    _fit(folder)
    return KMeans.load(folder).fingerprint


@lru_cache
def units() -> Path:
    folder = Path(tempfile.mkdtemp())
    _fit(folder)
    return folder


def _assign_config(folder: Path) -> AssignConfig:
    return AssignConfig(
        str(units()), str(folder), audio=str(recordings()), num_workers=1, device="cpu", format="jsonl"
    )


def make_assign_folder(folder: Path) -> None:
    """Labels of recordings that were stopped before their parts were joined."""
    import speechlm_ext.units.assign as module

    with mock.patch.object(module, "_join", lambda *_: 0):
        run_assign(_assign_config(folder))


def read_assign_folder(folder: Path) -> Any:
    run_assign(_assign_config(folder))
    return (folder / "units.jsonl").read_bytes()


def _assign_shards_config(folder: Path) -> AssignConfig:
    return AssignConfig(
        str(folder / "kmeans"), str(folder / "out"), features=str(folder / "features"), device="cpu"
    )


def make_assigned_shards(folder: Path) -> None:
    """Shards, their units, and labels of which all are there."""
    for name in ("features", "kmeans"):
        (folder / name).mkdir()
    make_feature_shards(folder / "features")
    make_kmeans(folder / "kmeans")
    run_assign(_assign_shards_config(folder))


def read_assigned_shards(folder: Path) -> Any:
    run_assign(_assign_shards_config(folder))
    return [plain(np.load(folder / "out" / f"{name}.npy")) for name in "abc"]
