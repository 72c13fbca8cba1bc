"""K-Means as the tokenizers need it: small fits in memory, by this process alone, seeded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from speechlm_ext.errors import TokenizerError
from speechlm_ext.kmeans import KMeans
from speechlm_ext.ops import kmeans_assign


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
    # The start is plain k-means++, not greedy: a codec from the greedy start used half as many codes in its last stages
    # and erred by 6 % more on new speech. On a subsample, since the start only has to be spread out.
    model = KMeans(
        num_clusters,
        n_local_trials=1,
        init_size=32 * num_clusters,
        max_iter=iterations,
        tol=0.0,
        random_state=seed,
        distributed=False,
        progress=False,
    )
    labels_N = torch.as_tensor(model.fit_predict(x_NF)).long()
    return Fitted(model.cluster_centers_, labels_N)
