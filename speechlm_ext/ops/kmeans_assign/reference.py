"""kmeans_assign in plain torch: direct float64 distances, chunk by chunk, and the minimum of each row.

A sum in float64 depends on its order, and so does the argmin of two distances that differ only by rounding. The order
is therefore part of the op: 32 partial sums of the columns f, f + 32, …, added in halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # of partial sums
_LANES = 32


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """float64 ``[N, K]``, in the op's order of additions."""
    lanes = x.new_zeros(x.shape[0], centroids.shape[0], _LANES, dtype=torch.float64)
    for first in range(0, x.shape[1], _LANES):
        part = slice(first, first + _LANES)
        difference = x[:, None, part].double() - centroids[None, :, part].double()
        lanes[..., : difference.shape[2]] += difference * difference
    step = _LANES // 2
    while step:
        lanes[..., :step] += lanes[..., step : 2 * step]
        step //= 2
    return lanes[..., 0]


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """``labels [N]`` int32, the lowest index among equals, and squared distances ``[N]`` float64; -1 and NaN for a row
    that is not finite."""
    num_clusters = centroids.shape[0]
    labels = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    distance = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    chunk = max(1, _CHUNK_BYTES // (8 * num_clusters * _LANES))
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk]
        squared = squared_distances(rows, centroids)
        minimum = squared.amin(dim=1)
        index = torch.arange(num_clusters, device=x.device)
        label = torch.where(squared == minimum[:, None], index, num_clusters).amin(dim=1)
        finite = rows.isfinite().all(dim=1)
        labels[start : start + chunk] = torch.where(finite, label, -1).to(torch.int32)
        distance[start : start + chunk] = torch.where(finite, minimum, torch.nan)
    return labels, distance
