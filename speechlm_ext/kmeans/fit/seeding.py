"""Initial centroids: given, random rows, greedy k-means++, or k-means|| for data too large for that.

All draws are functions of the seed and the rows' numbers (``counter_rng.py``) and all sums exact (``fixed_point.py``),
so the start does not depend on blocks, threads or ranks.

``k-means++`` looks at all rows for each centroid. Up to ``N * K * F = 2e9`` and ``N * F = 2^25`` (seconds; 256 MiB in
float64) every rank computes it on all the rows. Beyond, k-means|| of Bahmani et al., "Scalable k-means++", VLDB 2012:
five rounds that each take every row with probability ``l d^2 / sum d^2``, d its distance from the candidates so far;
then weighted greedy k-means++ among the candidates, each weighted by the number of rows nearest to it. l is 2K up to
K = 1000 and K/2 for large K, so that the candidates stay a small multiple of the clusters. The distance to the nearest
candidate and its number are stored for each row: 8 bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.counter_rng import row_keys, uniforms
from speechlm_ext.kmeans.features.sources import ArraySource
from speechlm_ext.kmeans.fit.fixed_point import grid_step, to_grid
from speechlm_ext.kmeans.fit.greedy_seeding import greedy_plus_plus
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import Data, scan
from speechlm_ext.kmeans.settings import Settings, init_array
from speechlm_ext.ops import CentroidIndex, kmeans_assign

_MAX_GREEDY_PRODUCTS, _MAX_GREEDY_VALUES = 2e9, 1 << 25
_ROUNDS, _MAX_ROUNDS = 5, 40


def initial_centers(data: Data, settings: Settings, run: int = 0) -> Tensor:
    """Start number ``run`` of a fit: ``[K, F]`` in ``data.dtype``, the same on every rank.

    With fewer distinct rows than clusters some are equal. Raises :class:`KMeansError`: an unusable array as init.
    """
    num_clusters, width, init = settings.n_clusters, data.source.num_features, settings.init
    if not isinstance(init, str):
        centers = init_array(init)
        if tuple(centers.shape) != (num_clusters, width) or not centers.is_floating_point():
            raise KMeansError(
                f"K-Means: init must be float [{num_clusters}, {width}] for {num_clusters} clusters of these "
                f"features, got {centers.dtype} {list(centers.shape)}.",
                argument="init",
            )
        if not bool(centers.isfinite().all()):
            raise KMeansError("K-Means: init has a value that is not a finite number; give other centroids.")
        return centers.detach().to(device=data.device, dtype=data.dtype, copy=True)
    purpose = f"{init}/{run}"
    size = data.num_usable * width
    if init == "random":
        rows = smallest_rows(data, num_clusters, seed=settings.random_state, purpose=purpose)
    elif init == "k-means++" and size * num_clusters <= _MAX_GREEDY_PRODUCTS and size <= _MAX_GREEDY_VALUES:
        rows = data.ranks.gather(torch.cat([data.no_rows(), *_finite_blocks(data)]))
        rows = _greedy(data, settings, rows, purpose=purpose)
    else:
        rows = _parallel(data, settings, purpose)
    return rows.to(data.dtype)


def _greedy(
    data: Data, settings: Settings, rows: Tensor, *, purpose: str, weights: Tensor | None = None
) -> Tensor:
    """``n_clusters`` of ``rows`` by greedy k-means++."""
    chosen = greedy_plus_plus(
        rows.double() - data.grid.offset,
        settings.n_clusters,
        seed=settings.random_state,
        purpose=purpose,
        weights=weights,
        trials=settings.n_local_trials,
        progress=_progress(data),
    )
    return rows[chosen]


def subsample(data: Data, num_rows: int, *, seed: int, purpose: str) -> Data:
    """``num_rows`` finite rows drawn without replacement, in memory and the same on every rank."""
    rows = smallest_rows(data, min(num_rows, data.num_usable), seed=seed, purpose=purpose)
    return scan(ArraySource(rows.to(data.dtype)), Ranks(), device=data.device, progress=_progress(data))


def smallest_rows(data: Data, num_rows: int, *, seed: int, purpose: str) -> Tensor:
    """The finite rows with the smallest keys, ``[num_rows, F]``: a draw without replacement, in one pass."""
    keys = torch.empty(0, dtype=torch.int64, device=data.device)
    rows = data.no_rows()
    if num_rows == 0:
        return rows
    for first, block in data.blocks(purpose):
        numbers = torch.arange(first, first + block.shape[0], device=data.device) + data.first_row
        new = row_keys(seed, purpose, numbers)
        mask = block.isfinite().all(dim=1) if data.num_dropped else torch.ones_like(new, dtype=torch.bool)
        if keys.shape[0] == num_rows:
            mask &= new < keys[-1]
        keys, rows = _smallest(torch.cat([keys, new[mask]]), torch.cat([rows, block[mask]]), num_rows)
    return _smallest(data.ranks.gather(keys), data.ranks.gather(rows), num_rows)[1]


def _smallest(keys: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    order = keys.argsort()[:num_rows]  # no two keys are equal
    return keys[order], rows[order]


def _finite_blocks(data: Data) -> Iterator[Tensor]:
    for _, block in data.blocks():
        yield block[block.isfinite().all(dim=1)] if data.num_dropped else block


def _progress(data: Data) -> bool | None:
    """Of work that all ranks do alike: only the first one shows it."""
    return False if data.ranks.rank else data.progress


def _parallel(data: Data, settings: Settings, purpose: str) -> Tensor:
    """k-means||: ``[K, F]`` in ``data.work_dtype``."""
    num_clusters, seed, num_rows = settings.n_clusters, settings.random_state, data.source.num_rows
    nearest = torch.full((num_rows,), torch.inf, dtype=data.work_dtype, device=data.device)
    owner = torch.full((num_rows,), -1, dtype=torch.int32, device=data.device)
    rows_per_round = max(num_clusters / 2, min(2 * num_clusters, 2000))
    candidates = smallest_rows(data, 1, seed=seed, purpose=purpose)
    num_measured = 0
    for number in range(_MAX_ROUNDS):
        _update_nearest(data, candidates, num_measured, nearest, owner)
        num_measured = candidates.shape[0]
        largest = torch.zeros((), dtype=torch.float64, device=data.device)
        if num_rows:
            largest = nearest.max().double()
        data.ranks.max_(largest)
        if float(largest) == 0.0 or (number >= _ROUNDS and num_measured >= num_clusters):
            break
        step = grid_step(largest, data.num_rows)
        total = torch.zeros((), dtype=torch.float64, device=data.device)
        for part in nearest.split(1 << 18):
            total += to_grid(part.double(), step).sum()
        data.ranks.sum_(total)
        drawn = _draw_rows(nearest, rows_per_round / total, data.first_row, seed, f"{purpose}/{number}")
        candidates = torch.cat([candidates, data.ranks.gather(_read_rows(data, drawn))])
    if num_measured <= num_clusters:  # fewer distinct rows than clusters: fill up with any rows
        rest = smallest_rows(data, num_clusters - num_measured, seed=seed, purpose=f"{purpose}/rest")
        return torch.cat([candidates, rest])
    weights = torch.bincount(owner[owner >= 0], minlength=num_measured).double()
    data.ranks.sum_(weights)
    return _greedy(data, settings, candidates, purpose=f"{purpose}/among", weights=weights)


def _update_nearest(
    data: Data, candidates: Tensor, num_measured: int, nearest: Tensor, owner: Tensor
) -> None:
    """Update each row's nearest candidate and its squared distance by the candidates from ``num_measured`` on."""
    if num_measured == candidates.shape[0]:
        return
    index = CentroidIndex.build(candidates[num_measured:])
    for first, block in data.blocks("k-means||"):
        rows = slice(first, first + block.shape[0])
        labels, squared = kmeans_assign(block, index, return_distance=True)
        if data.num_dropped:
            nearest[rows] = torch.where(labels < 0, 0.0, nearest[rows])
        closer = squared < nearest[rows]
        nearest[rows] = torch.where(closer, squared, nearest[rows])
        owner[rows] = torch.where(closer, labels + num_measured, owner[rows])


def _draw_rows(nearest: Tensor, factor: Tensor, first_row: int, seed: int, purpose: str) -> Tensor:
    """Local numbers of the drawn rows, ascending, each drawn with probability ``factor`` times its distance."""
    found = [torch.empty(0, dtype=torch.int64, device=nearest.device)]
    for start in range(0, nearest.shape[0], 1 << 18):
        part = nearest[start : start + (1 << 18)].double()
        numbers = torch.arange(start, start + part.shape[0], device=nearest.device)
        found.append(numbers[uniforms(seed, purpose, numbers + first_row) < part * factor])
    return torch.cat(found)


def _read_rows(data: Data, numbers: Tensor) -> Tensor:
    """The rows with these local numbers (ascending), ``[n, F]``; only blocks that contain some are read."""
    parts = [data.no_rows()]
    _, sizes = torch.unique_consecutive(numbers // data.block_rows, return_counts=True)
    for group in numbers.split(sizes.tolist()) if numbers.numel() else ():
        for first, block in data.source.blocks(int(group[0]), int(group[-1]) + 1, data.block_rows):
            inside = group[(group >= first) & (group < first + block.shape[0])] - first
            parts.append(block.to(device=data.device, dtype=data.work_dtype)[inside])
    return torch.cat(parts)
