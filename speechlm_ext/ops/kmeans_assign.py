"""kmeans_assign: the nearest centroid of every feature row, certified to be the float64 argmin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops._native import check, describe
from speechlm_ext.ops.reference import kmeans_assign as reference
from speechlm_ext.ops.reference.kmeans_assign import CentroidIndex


@torch.no_grad()
def kmeans_assign(
    x: Tensor,
    centroids: Tensor | CentroidIndex,
    *,
    mode: Literal["exact", "fast"] = "exact",
    return_distance: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label each row with its nearest centroid (squared Euclidean distance).

    Never holds an N×K matrix. Not differentiable.

    Args:
        x: float ``[N, F]``, any float dtype.
        centroids: float ``[K, F]`` finite, or a `CentroidIndex` built from it once, for many calls.
        mode: ``"exact"`` gives the argmin of the float64 distance, the lowest index among equals: rows whose best two
            are closer than the rounding error allows are compared again in float64. ``"fast"`` skips that.
        return_distance: also return the squared distances.

    Returns:
        ``labels [N]`` int32; with ``return_distance`` also ``[N]`` float32 (float64 for float64 ``x``). A row with a
        NaN or an infinity has label -1 and distance NaN.

    Raises:
        OpError: (a ValueError) for shapes or dtypes that do not fit, no centroid, or a centroid that is not finite.
    """
    op = "kmeans_assign"
    check(mode in ("exact", "fast"), f'{op}: mode must be "exact" or "fast"; got {mode!r}')
    check(x.dim() == 2 and x.is_floating_point(), f"{op}: x must be float [N, F]; got {describe(x)}")
    given = centroids.centroids if isinstance(centroids, CentroidIndex) else centroids
    check(
        given.dim() == 2
        and given.is_floating_point()
        and given.shape[0] > 0
        and given.shape[1] == x.shape[1],
        f"{op}: centroids must be float [K, {x.shape[1]}] with K >= 1 to fit x; got {describe(given)}",
    )
    check(given.device == x.device, f"{op}: x is on {x.device} but centroids is {describe(given)}")
    if isinstance(centroids, CentroidIndex):
        index = centroids
    else:
        is_finite = centroids.isfinite().all(dim=1)
        bad = int((~is_finite).nonzero()[0]) if not bool(is_finite.all()) else -1
        check(bad < 0, f"{op}: centroids[{bad}] is not finite")
        index = CentroidIndex.build(centroids)
    labels = reference.assign(x, index, mode == "exact")
    return (labels, reference.distance_to(x, index, labels)) if return_distance else labels
