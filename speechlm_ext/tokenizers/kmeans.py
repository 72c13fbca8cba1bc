"""K-Means fit and assignment as the tokenizers need them: small, seeded, on the CPU.

Lloyd's algorithm from k-means++ starts; a cluster that becomes empty takes the point that lies farthest from
its own centroid. Everything depends on the input and the seed alone.
"""

from __future__ import annotations

import torch

from speechlm_ext.errors import TokenizerError
from speechlm_ext.ops.kmeans_assign import kmeans_assign


def assign(x_NF: torch.Tensor, centroids_KF: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """Nearest centroid of each row by Euclidean distance, int64 ``[N]``; ties go to the lowest index.

    ``exact`` gives the float64 argmin, the same on every machine; a fit can do without.
    """
    labels = kmeans_assign(x_NF, centroids_KF, mode="exact" if exact else "fast")
    return torch.as_tensor(labels).long()


def fit_kmeans(
    x_NF: torch.Tensor, num_clusters: int, *, seed: int, iterations: int = 15, what: str = "K-Means"
) -> torch.Tensor:
    """Fit ``num_clusters`` centroids, float32 ``[K, F]``, to the rows of ``x_NF``.

    Args:
        seed: fixes the start and thereby the result.
        iterations: Lloyd steps; stops earlier when no row changes its cluster.
        what: whose fit this is, for the error.

    Raises:
        TokenizerError: fewer rows than clusters.
    """
    num_rows = x_NF.shape[0]
    if num_rows < num_clusters:
        raise TokenizerError(
            f"{what}: {num_clusters} clusters need at least as many frames, got {num_rows}. Give more audio "
            f"to fit on, or ask for at most {num_rows} clusters."
        )
    generator = torch.Generator().manual_seed(seed)
    centroids_KF = _plus_plus(x_NF, num_clusters, generator)
    labels = torch.full((num_rows,), -1)
    for _ in range(iterations):
        new_labels = assign(x_NF, centroids_KF, exact=False)
        if torch.equal(new_labels, labels):
            break
        labels = new_labels
        centroids_KF = cluster_means(x_NF, labels, centroids_KF)
    return centroids_KF


def cluster_means(x_NF: torch.Tensor, labels_N: torch.Tensor, centroids_KF: torch.Tensor) -> torch.Tensor:
    """Mean of each cluster's rows; empty clusters move to the rows that are farthest from their centroids."""
    num_clusters = centroids_KF.shape[0]
    counts = torch.bincount(labels_N, minlength=num_clusters)
    sums = torch.zeros_like(centroids_KF).index_add_(0, labels_N, x_NF)
    means = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        distance = (x_NF - centroids_KF[labels_N]).square().sum(1)
        means[empty] = x_NF[distance.topk(len(empty)).indices]
    return means


def _plus_plus(x_NF: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    # k-means++ on a subsample: the start only has to be spread out, and each draw costs one pass.
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
