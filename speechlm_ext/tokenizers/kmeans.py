"""K-Means as the tokenizers need it: small fits in memory, by this process alone, seeded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from speechlm_ext.errors import TokenizerError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.ops.kmeans_assign import kmeans_assign


class Fitted(NamedTuple):
    """What a fit gives."""

    centroids_KF: torch.Tensor
    """float32 ``[K, F]``."""
    labels_N: torch.Tensor
    """int64 ``[N]``: the nearest centroid of each row."""


def assign(x_NF: torch.Tensor, centroids_KF: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """Nearest centroid of each row by Euclidean distance, int64 ``[N]``; ties go to the lowest index.

    ``exact`` gives the float64 argmin, the same on every machine; a fit can do without.
    """
    labels = kmeans_assign(x_NF, centroids_KF, mode="exact" if exact else "fast")
    return torch.as_tensor(labels).long()


def fit(x_NF: torch.Tensor, num_clusters: int, *, seed: int, iterations: int, what: str) -> Fitted:
    """Fit ``num_clusters`` centroids to the rows of ``x_NF`` (float ``[N, F]``).

    Args:
        seed: fixes the start and thereby the result.
        iterations: Lloyd steps; stops earlier when no centroid moves.
        what: whose fit this is, for the error.

    Raises:
        TokenizerError: fewer rows than clusters.
    """
    if len(x_NF) < num_clusters:
        raise TokenizerError(
            f"{what}: {num_clusters} clusters need at least as many frames, got {len(x_NF)}. Give more audio "
            f"to fit on, or ask for at most {len(x_NF)} clusters."
        )
    start_KF = _plus_plus(x_NF, num_clusters, torch.Generator().manual_seed(seed))
    model = KMeans(
        num_clusters, init=start_KF, max_iter=iterations, tol=0.0, distributed=False, progress=False
    )
    labels_N = torch.as_tensor(model.fit_predict(x_NF)).long()
    return Fitted(model.cluster_centers_, labels_N)


def _plus_plus(x_NF: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    # On a subsample: the start only has to be spread out, and each draw costs one pass. Plain, not greedy: a codec
    # from the greedy start of `KMeans` used half as many codes in its last stages and erred by 6 % more on new speech.
    limit = max(num_clusters, min(x_NF.shape[0], 32 * num_clusters))
    x_NF = x_NF[torch.randperm(x_NF.shape[0], generator=generator)[:limit]]
    squares_N = x_NF.square().sum(1)
    chosen = [int(torch.randint(x_NF.shape[0], (1,), generator=generator))]
    nearest_N = torch.full_like(squares_N, torch.inf)
    for _ in range(num_clusters - 1):
        last = x_NF[chosen[-1]]
        nearest_N = torch.minimum(nearest_N, (squares_N - 2 * (x_NF @ last) + last @ last).clamp_min(0))
        total = float(nearest_N.sum())
        if total > 0:
            chosen.append(int(torch.multinomial(nearest_N, 1, generator=generator)))
        else:  # fewer distinct rows than clusters: any row will do
            chosen.append(int(torch.randint(x_NF.shape[0], (1,), generator=generator)))
    return x_NF[chosen].clone()
