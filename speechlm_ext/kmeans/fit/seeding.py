"""Where the centroids start: given, random rows, greedy k-means++, or k-means|| for data too large for that.

All draws are functions of the seed and the rows' numbers (``hashing.py``) and all sums exact (``sums.py``), so a start
does not depend on blocks, threads or ranks.

``k-means++`` looks at all rows for each centre. Up to ``N * K * F = 2e9`` and ``N * F = 2^25`` (seconds; 256 MiB in
float64) that is what happens, on every rank the same with all the rows. Beyond, k-means|| of Bahmani et al., "Scalable
k-means++", VLDB 2012: five rounds that each take every row with probability ``l d^2 / sum d^2``, d its distance from
the candidates so far; then weighted greedy k-means++ among the candidates, each with the number of rows nearest to
it. l is 2K up to K = 1000 and K/2 for large K, so that the candidates stay a small multiple of the clusters. The
distance to the nearest candidate and its number are kept for each row: 8 bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.counter_rng import row_keys, uniforms
from speechlm_ext.kmeans.features.sources import ArraySource
from speechlm_ext.kmeans.fit.fixed_point import grid_step, to_grid
from speechlm_ext.kmeans.fit.greedy_seeding import greedy_plus_plus
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.kmeans.fit.scan import Data, survey
from speechlm_ext.ops import CentroidIndex, kmeans_assign

METHODS = ("k-means++", "k-means||", "random")
_GREEDY_WORK, _GREEDY_VALUES = 2e9, 1 << 25
_ROUNDS, _MOST_ROUNDS = 5, 40


def given_centers(init: Any) -> Tensor:
    """Centroids that were given as init, as a tensor; their shape is not looked at.

    Raises:
        KMeansError: not numbers, or rows of different lengths.
    """
    try:
        return torch.as_tensor(init)
    except (RuntimeError, TypeError, ValueError) as error:
        raise KMeansError(
            f"K-Means: init should be one of {', '.join(METHODS)} or a float array [n_clusters, F], all rows of one "
            f"length; got a {type(init).__name__} that is no such array ({error}). Give a tensor or a numpy array."
        ) from None


def initial_centers(
    data: Data, num_clusters: int, init: Any, *, seed: int, run: int = 0, trials: int | None = None
) -> Tensor:
    """The start of a fit.

    Args:
        data: the rows, at least ``num_clusters`` of them finite.
        num_clusters: K.
        init: one of ``METHODS``, or an array ``[K, F]``.
        seed: of the fit.
        run: which start of several this is.
        trials: of k-means++, also among the candidates of k-means||; see ``greedy_plus_plus``.

    Returns:
        ``[K, F]`` in ``data.dtype``, the same on every rank. With fewer distinct rows than clusters some are equal.

    Raises:
        KMeansError: an array of another shape or with a value that is not finite.
    """
    width = data.source.num_features
    if not isinstance(init, str):
        centers = given_centers(init)
        if tuple(centers.shape) != (num_clusters, width) or not centers.is_floating_point():
            raise KMeansError(
                f"K-Means: init should be float [{num_clusters}, {width}] for {num_clusters} clusters of these "
                f"features; got {centers.dtype} {list(centers.shape)}."
            )
        if not bool(centers.isfinite().all()):
            raise KMeansError("K-Means: init has a value that is not a finite number; give other centroids.")
        return centers.detach().to(device=data.device, dtype=data.dtype, copy=True)
    purpose = f"{init}/{run}"
    if init == "random":
        return smallest_rows(data, num_clusters, seed=seed, purpose=purpose).to(data.dtype)
    size = data.num_usable * width
    if init == "k-means++" and size * num_clusters <= _GREEDY_WORK and size <= _GREEDY_VALUES:
        rows = data.ranks.gather(torch.cat([block for _, block in finite_blocks(data)] or [_none(data)]))
        chosen = greedy_plus_plus(
            _centred(data, rows),
            num_clusters,
            seed=seed,
            purpose=purpose,
            trials=trials,
            progress=_shown(data),
        )
        return rows[chosen].to(data.dtype)
    return _parallel(data, num_clusters, seed=seed, purpose=purpose, trials=trials).to(data.dtype)


def subsample(data: Data, num_rows: int, *, seed: int, purpose: str) -> Data:
    """``num_rows`` finite rows drawn without replacement, in memory and the same on every rank."""
    rows = smallest_rows(data, min(num_rows, data.num_usable), seed=seed, purpose=purpose)
    return survey(ArraySource(rows.to(data.dtype)), Ranks(), device=data.device, progress=_shown(data))


def smallest_rows(data: Data, num_rows: int, *, seed: int, purpose: str) -> Tensor:
    """The finite rows with the smallest keys, ``[num_rows, F]``: a draw without replacement, in one walk."""
    keys = torch.empty(0, dtype=torch.int64, device=data.device)
    rows = _none(data)
    if num_rows == 0:
        return rows
    for first, block in data.blocks(purpose):
        numbers = torch.arange(first, first + block.shape[0], device=data.device) + data.first_row
        new = row_keys(seed, purpose, numbers)
        mask = block.isfinite().all(dim=1) if data.num_dropped else torch.ones_like(new, dtype=torch.bool)
        if keys.shape[0] == num_rows:
            mask &= new < keys[-1]
        keys, rows = _merge(torch.cat([keys, new[mask]]), torch.cat([rows, block[mask]]), num_rows)
    return _merge(data.ranks.gather(keys), data.ranks.gather(rows), num_rows)[1]


def _merge(keys: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    order = keys.argsort()[:num_rows]  # no two keys are equal
    return keys[order], rows[order]


def finite_blocks(data: Data) -> Iterator[tuple[int, Tensor]]:
    """``data.blocks`` without the rows that are not finite."""
    for first, block in data.blocks():
        yield first, block[block.isfinite().all(dim=1)] if data.num_dropped else block


def _shown(data: Data) -> bool | None:
    """Progress of what all ranks do alike: the first one shows it."""
    return False if data.ranks.rank else data.progress


def _none(data: Data) -> Tensor:
    return torch.empty(0, data.source.num_features, dtype=data.work_dtype, device=data.device)


def _centred(data: Data, rows: Tensor) -> Tensor:
    return rows.double() - data.grid.offset


def _parallel(data: Data, num_clusters: int, *, seed: int, purpose: str, trials: int | None) -> Tensor:
    """k-means||: ``[K, F]`` in ``data.work_dtype``."""
    count = data.source.num_rows
    nearest = torch.full((count,), torch.inf, dtype=data.work_dtype, device=data.device)
    owner = torch.full((count,), -1, dtype=torch.int32, device=data.device)
    wanted = max(num_clusters / 2, min(2 * num_clusters, 2000))
    candidates = smallest_rows(data, 1, seed=seed, purpose=purpose)
    known = 0
    for turn in range(_MOST_ROUNDS):
        _measure(data, candidates, known, nearest, owner)
        known = candidates.shape[0]
        most = nearest.max().double() if count else torch.zeros((), dtype=torch.float64, device=data.device)
        data.ranks.max_(most)
        if float(most) == 0.0 or (turn >= _ROUNDS and known >= num_clusters):
            break
        step = grid_step(most, data.num_rows)
        total = torch.zeros((), dtype=torch.float64, device=data.device)
        for part in nearest.split(1 << 18):
            total += to_grid(part.double(), step).sum()
        data.ranks.sum_(total)
        picked = _pick(nearest, wanted / total, data.first_row, seed, f"{purpose}/{turn}")
        candidates = torch.cat([candidates, data.ranks.gather(_rows_of(data, picked))])
    weights = torch.bincount(owner[owner >= 0], minlength=known).double()
    data.ranks.sum_(weights)
    if known <= num_clusters:  # fewer distinct rows than clusters: any rows fill up
        rest = smallest_rows(data, num_clusters - known, seed=seed, purpose=f"{purpose}/rest")
        return torch.cat([candidates, rest])
    chosen = greedy_plus_plus(
        _centred(data, candidates),
        num_clusters,
        seed=seed,
        purpose=f"{purpose}/among",
        weights=weights,
        trials=trials,
        progress=_shown(data),
    )
    return candidates[chosen]


def _measure(data: Data, candidates: Tensor, known: int, nearest: Tensor, owner: Tensor) -> None:
    """Take the candidates from number ``known`` on into account: distance and number of each row's nearest."""
    if known == candidates.shape[0]:
        return
    index = CentroidIndex.build(candidates[known:])
    for first, block in data.blocks("k-means||"):
        rows = slice(first, first + block.shape[0])
        labels, squared = kmeans_assign(block, index, return_distance=True)
        if data.num_dropped:
            nearest[rows] = torch.where(labels < 0, 0.0, nearest[rows])
        closer = squared < nearest[rows]
        nearest[rows] = torch.where(closer, squared, nearest[rows])
        owner[rows] = torch.where(closer, labels + known, owner[rows])


def _pick(nearest: Tensor, factor: Tensor, first_row: int, seed: int, purpose: str) -> Tensor:
    """Numbers on this rank of the rows that are drawn, each with probability ``factor`` times its distance."""
    found = [torch.empty(0, dtype=torch.int64, device=nearest.device)]
    for start in range(0, nearest.shape[0], 1 << 18):
        part = nearest[start : start + (1 << 18)].double()
        numbers = torch.arange(start, start + part.shape[0], device=nearest.device)
        found.append(numbers[uniforms(seed, purpose, numbers + first_row) < part * factor])
    return torch.cat(found)


def _rows_of(data: Data, picked: Tensor) -> Tensor:
    """The rows with these numbers (ascending), ``[n, F]``; only blocks that have some are read."""
    numbers, found = picked.tolist(), [_none(data)]
    at = 0
    while at < len(numbers):
        start = numbers[at]
        stop = min(data.source.num_rows, start + data.block_rows)
        end = at
        while end < len(numbers) and numbers[end] < stop:
            end += 1
        for first, block in data.source.blocks(start, numbers[end - 1] + 1, data.block_rows):
            block = block.to(device=data.device, dtype=data.work_dtype)
            inside = picked[at:end] - first
            found.append(block[inside[(inside >= 0) & (inside < block.shape[0])]])
        at = end
    return torch.cat(found)
