"""Rows that the K-Means tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def clustered(
    num_rows: int = 1500, num_features: int = 6, num_clusters: int = 12, *, seed: int = 0, spread: float = 1.0
) -> torch.Tensor:
    """float32 ``[N, F]``: clusters of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    centers = 8 * torch.randn(num_clusters, num_features, generator=generator)
    sizes = torch.arange(1, num_clusters + 1).double()
    which = torch.multinomial(sizes, num_rows, replacement=True, generator=generator)
    return centers[which] + spread * torch.randn(num_rows, num_features, generator=generator)


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
