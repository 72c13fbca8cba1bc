"""Rows, and the command line, that the K-Means tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from speechlm_ext.cli import main
from speechlm_ext.kmeans.counter_rng import uniforms


def clustered(
    num_rows: int = 1500, num_features: int = 6, num_clusters: int = 12, *, seed: int = 0, spread: float = 1.0
) -> torch.Tensor:
    """float32 ``[N, F]``: clusters of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    centers = 8 * torch.randn(num_clusters, num_features, generator=generator)
    sizes = torch.arange(1, num_clusters + 1).double()
    which = torch.multinomial(sizes, num_rows, replacement=True, generator=generator)
    return centers[which] + spread * torch.randn(num_rows, num_features, generator=generator)


def plus_plus(
    points: torch.Tensor,
    num_clusters: int,
    *,
    seed: int,
    purpose: str,
    trials: int = 1,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """k-means++ as it is written in books, in float64 by differences, with the draws of the package: int64 ``[K]``."""
    points = points.double()
    weights = torch.ones(len(points), dtype=torch.float64) if weights is None else weights
    draws = uniforms(seed, purpose, torch.arange(num_clusters * trials)).view(num_clusters, trials)

    def drawn(mass: torch.Tensor, draw: torch.Tensor) -> int:
        return int(((mass.cumsum(0) / mass.sum()) <= draw).sum())

    chosen = [drawn(weights, draws[0, 0])]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for k in range(1, num_clusters):
        tried = [drawn(nearest * weights, draw) for draw in draws[k]]
        left = [torch.minimum(nearest, (points - points[t]).square().sum(1)) for t in tried]
        best = min(range(trials), key=lambda i: float((left[i] * weights).sum()))
        chosen.append(tried[best])
        nearest = left[best]
    return torch.tensor(chosen)


def kmeans(*words: object) -> int:
    return main(["kmeans", *map(str, words)])


def rows_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(p) for p in sorted(folder.glob("*.npy"))])


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """Waiting for the disk takes most of a small fit's time, and no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These fits are too small for more; how results depend on threads is a test of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def x() -> torch.Tensor:
    return clustered()


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> Path:
    """Three shards of 500, 300 and 200 rows with 6 features around 8 centres."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (8, 6))
    x = (centres[rng.integers(0, 8, 1000)] + rng.normal(0, 1, (1000, 6))).astype(np.float32)
    for name, part in zip("abc", np.split(x, [500, 800]), strict=True):
        np.save(folder / f"{name}.npy", part)
    return folder
