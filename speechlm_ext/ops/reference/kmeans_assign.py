"""kmeans_assign in plain torch: scores by GEMM in chunks, and exact distances for the rows that a bound calls close.

``argmin_k |x - c_k|²`` is ``argmin_k |c_k|²/2 - x·c_k`` after subtracting the mean centroid from both, which changes no
argmin and makes the rounding error, which grows with the norms, small. A computed score differs from the true one by
at most ``bound(row)``; centroids within twice the bound of the best are compared again by the direct float64
distance, so the label is the float64 argmin, lowest index among equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_BYTES = 8 << 20  # scores of one chunk: stays in cache
_PAIR_BYTES = 64 << 20  # differences of one block of (row, candidate) pairs


@dataclass(frozen=True)
class CentroidIndex:
    """Centroids prepared once for many calls."""

    centroids: Tensor
    """``[K, F]`` as given."""
    mean: Tensor
    """``[F]`` mean centroid."""
    centred: Tensor
    """``[K, F]`` centroids less the mean, float32 (float64 if given so)."""
    half_norms: Tensor
    """``[K]`` half the squared norms of ``centred``."""
    largest_norm: float
    """The largest norm among ``centred``."""

    @classmethod
    def build(cls, centroids: Tensor) -> CentroidIndex:
        """Prepare ``centroids`` (float ``[K, F]``, finite)."""
        wide = centroids.detach().double()
        dtype = torch.float64 if centroids.dtype == torch.float64 else torch.float32
        mean = wide.mean(dim=0).to(dtype)
        centred = wide - mean.double()
        squared = centred.square().sum(dim=1)
        return cls(
            centroids=centroids.detach(),
            mean=mean,
            centred=centred.to(dtype).contiguous(),
            half_norms=(squared / 2).to(dtype),
            largest_norm=float(squared.max().sqrt()),
        )


def assign(x: Tensor, index: CentroidIndex, exact: bool) -> Tensor:
    """int32 label of each row of ``x [N, F]``; -1 for a row that is not finite."""
    dtype = index.centred.dtype if x.dtype != torch.float64 else torch.float64
    num_clusters, width = index.centred.shape
    centred = index.centred.to(dtype)
    labels = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    chunk = max(64, _CHUNK_BYTES // (num_clusters * dtype.itemsize))
    unit = torch.finfo(dtype).eps
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk].detach().to(dtype) - index.mean.to(dtype)
        scores = torch.addmm(index.half_norms.to(dtype), rows, centred.T, alpha=-1)
        best, label = scores.min(dim=1)
        finite = rows.isfinite().all(dim=1)
        if exact:
            norms = rows.double().norm(dim=1)
            # Each of the F products and sums rounds once, and so do the inputs and the half norms.
            bound = 2 * unit * (width + 4) * (norms * index.largest_norm + index.largest_norm**2)
            close = scores <= (best.double() + 2 * bound)[:, None]
            unsure = finite & ((close.sum(dim=1) > 1) | ~best.isfinite())
            picked = unsure.nonzero().squeeze(1)
            if picked.numel():
                # A score that overflowed says nothing: then every centroid is a candidate.
                candidates = close[picked] | ~scores[picked].isfinite().all(dim=1, keepdim=True)
                label[picked] = _rerank(x[start + picked], index.centroids, candidates)
        labels[start : start + chunk] = torch.where(finite, label, -1).to(torch.int32)
    return labels


def _rerank(rows: Tensor, centroids: Tensor, candidates: Tensor) -> Tensor:
    """Lowest-index argmin of the direct float64 distance among each row's candidates (bool ``[R, K]``)."""
    pairs = candidates.nonzero()
    block = max(1, _PAIR_BYTES // (8 * rows.shape[1]))
    distances = torch.cat(
        [
            (rows[part[:, 0]].double() - centroids[part[:, 1]].double()).square().sum(dim=1)
            for part in pairs.split(block)
        ]
    )
    row, cluster = pairs[:, 0], pairs[:, 1]
    least = distances.new_full((rows.shape[0],), float("inf")).scatter_reduce(0, row, distances, "amin")
    num_clusters = centroids.shape[0]
    winner = torch.where(distances == least[row], cluster, num_clusters)
    return row.new_full((rows.shape[0],), num_clusters).scatter_reduce(0, row, winner, "amin")


def distance_to(x: Tensor, index: CentroidIndex, labels: Tensor) -> Tensor:
    """Squared distance of each row to its centroid, float32 (float64 for float64 ``x``); NaN for label -1."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    block = max(1, _PAIR_BYTES // (dtype.itemsize * max(1, x.shape[1])))
    for start in range(0, x.shape[0], block):
        part = labels[start : start + block].long()
        difference = (
            x[start : start + block].detach().to(dtype) - index.centroids.to(dtype)[part.clamp(min=0)]
        )
        squared = difference.square().sum(dim=1)
        out[start : start + block] = torch.where(part < 0, float("nan"), squared)
    return out
