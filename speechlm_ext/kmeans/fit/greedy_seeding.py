"""Greedy k-means++ on points in memory, with weights.

Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007: each next centroid is a point drawn
with probability proportional to its squared distance from the centroids so far. Greedy: of several points drawn this
way (default ``2 + floor(ln K)``), the one that leaves the smallest sum of squared distances is taken.

Distances come from float64 products of points relative to the middle of their range, so nothing cancels for data far
from the origin; distances below the rounding error of that product count as 0, so equal rows are equal. For few points
all pairs are multiplied at once, which for K draws of L trials costs M/(K L) of multiplying the trials one by one and
leaves only table look-ups in the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from speechlm_ext.kmeans.counter_rng import uniforms
from speechlm_ext.kmeans.fit.fixed_point import grid_step, to_grid

# Products in tiles of one thread each: the same bits for any number of threads.
from speechlm_ext.ops.common.matmul import matmul_into
from speechlm_ext.utils.progress import stage_bar

_MAX_TABLE_POINTS = 1 << 14  # a table of all their pairs: 1 GiB of float32


def greedy_plus_plus(
    points: Tensor,
    num_clusters: int,
    *,
    seed: int,
    purpose: str,
    weights: Tensor | None = None,
    trials: int | None = None,
    progress: bool | None = False,
) -> Tensor:
    """Choose K of the points: int64 ``[K]`` indices, which repeat where fewer than K points are distinct.

    Points are float64 ``[M, F]``, finite, relative to the middle of their range. A point represents ``weights`` rows
    (float64 ``[M]``, default 1). ``trials`` points are drawn for each centroid; 1 is plain k-means++.
    """
    num_points = points.shape[0]
    if weights is None:
        weights = points.new_ones(num_points)
    if trials is None:
        trials = 2 + int(math.log(num_clusters))
    numbers = torch.arange(num_clusters * trials, device=points.device)
    chances = uniforms(seed, purpose, numbers).view(num_clusters, trials)
    distances = _distances(points, num_clusters * trials, progress)

    first = _draw(weights, chances[0, :1])
    chosen = [first[0]]
    nearest = distances(first)[0]
    with stage_bar("k-means++", num_clusters, unit="centroid", progress=progress) as bar:
        bar.update()
        for k in range(1, num_clusters):
            mass = nearest * weights
            step = grid_step(mass.max(), num_points)
            drawn = _draw(to_grid(mass, step), chances[k])
            remaining = torch.minimum(distances(drawn), nearest)
            # On the grid the sums are exact, so two trials compare the same in any order of addition.
            best = to_grid(remaining * weights, step).sum(dim=1).argmin()
            chosen.append(drawn[best])
            nearest = remaining[best]
            bar.update()
    return torch.stack(chosen)


def _draw(mass: Tensor, chances: Tensor) -> Tensor:
    """Indices drawn in proportion to ``mass`` (on a grid, so that the cumulative sums are exact)."""
    cumulative = mass.cumsum(0)
    total = cumulative[-1]
    targets = torch.minimum(chances * total, torch.nextafter(total, -torch.ones_like(total)))
    # right=True skips points without mass.
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=mass.shape[0] - 1)


def _distances(points: Tensor, num_drawn: int, progress: bool | None) -> Callable[[Tensor], Tensor]:
    """A function from indices ``[L]`` to squared distances of those points to all, float64 ``[L, M]``."""
    num_points, width = points.shape
    largest = points.abs().max()
    # A power of two: exact, and keeps squares and the float32 table in range.
    points = points * torch.where(largest > 0, 2.0 ** -torch.frexp(largest).exponent.double(), 1.0)
    norms = points.square().sum(dim=1)
    unit = 4 * torch.finfo(torch.float64).eps * (width + 4)

    def distances(rows: Tensor | slice, others: slice) -> Tensor:
        a, b = points[rows], points[others]
        products = torch.empty(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
        matmul_into(products, a, b)
        scale = norms[rows][:, None] + norms[others]
        squared = products.mul_(-2).add_(scale)
        return squared.masked_fill_(squared <= scale.mul_(unit), 0.0)

    if num_points > _MAX_TABLE_POINTS or num_points > 4 * num_drawn:
        return lambda chosen: distances(chosen, slice(None))
    table = torch.empty(num_points, num_points, dtype=torch.float32, device=points.device)
    with stage_bar("k-means++, distances", num_points, progress=progress) as bar:
        for start in range(0, num_points, 512):
            rows = slice(start, min(num_points, start + 512))
            strip = distances(rows, slice(rows.stop))
            table[rows, : rows.stop] = strip
            table[:start, rows] = strip[:, :start].T
            bar.update(strip.shape[0])
    return lambda chosen: table[chosen].double()
