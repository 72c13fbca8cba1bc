"""Lloyd's algorithm: assign every row to its nearest centroid, move every centroid to the mean of its rows.

Lloyd, "Least squares quantization in PCM", 1982. Labels are the exact float64 argmin, sums are exact on a grid
(``sums.py``), so an iteration gives the same bits for any blocks, threads and ranks. A cluster without rows takes the
row farthest from its own centroid, as in scikit-learn: the row's weight leaves the cluster it was in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.kmeans.fit.fixed_point import add_cluster_sums, exact_sum, grid_step, to_grid
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.state import State, Step
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.ops.common.memory import lazy_zeros


class Farthest:
    """The rows farthest from their own centroids, at most ``limit``, ties by row number, of equal rows the first.

    Rows in memory are ``limit * F`` values, as many as the centroids.
    """

    def __init__(self, limit: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.limit = limit
        self.distances = torch.empty(0, dtype=dtype, device=device)
        self.labels = torch.empty(0, dtype=torch.int32, device=device)
        self.rows = torch.empty(0, width, dtype=dtype, device=device)

    def add(self, block: Tensor, labels: Tensor, distances: Tensor) -> None:
        """Take a block into account: ``[n, F]``, int32 ``[n]`` and ``[n]``; blocks come in order of their rows."""
        # A later row with an equal distance stays behind, so a full list admits only larger ones. NaN never enters.
        least = self.distances[-1] if self.distances.shape[0] == self.limit else 0.0
        fresh = (distances > least).nonzero()[:, 0]
        if fresh.numel() == 0:
            return
        held, known = self.rows, self.distances.shape[0]

        def rows(places: Tensor) -> Tensor:
            """Rows by place in ``held`` followed by the fresh ones; few are asked for, so these are not joined."""
            is_old = places < known
            found = held.new_empty(places.shape[0], held.shape[1])
            found[is_old] = held[places[is_old]]
            found[~is_old] = block[fresh[places[~is_old] - known]]
            return found

        self._keep(
            torch.cat([self.distances, distances[fresh]]), torch.cat([self.labels, labels[fresh]]), rows
        )

    def gather(self, data: Data) -> None:
        """The farthest of all ranks; they come in rank order, so ties still go to the lowest row."""
        gather = data.ranks.gather
        rows = gather(self.rows)
        self._keep(gather(self.distances), gather(self.labels), lambda places: rows[places])

    def _keep(self, distances: Tensor, labels: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        distances, order = distances.sort(descending=True, stable=True)
        # Equal rows, such as digital silence, would fill the list. They have equal distances and so stand together.
        tied = (distances[1:] == distances[:-1]).nonzero()[:, 0] + 1
        first = torch.ones_like(order, dtype=torch.bool)
        first[tied] = (rows(order[tied]) != rows(order[tied - 1])).any(dim=1)
        order = order[first][: self.limit]
        self.distances, self.labels, self.rows = distances[first][: self.limit], labels[order], rows(order)


@dataclass
class Walk:
    """What one walk over all rows gives, summed over all ranks."""

    sums: Tensor
    """float64 ``[K, F]`` on ``data.grid``."""
    counts: Tensor
    """int64 ``[K]``."""
    inertia: float
    """Sum of squared distances to the nearest centroid."""
    farthest: Farthest


def walk(
    data: Data,
    centers: Tensor,
    *,
    labels_out: Tensor | None = None,
    with_farthest: bool = False,
    what: str = "k-means",
) -> Walk:
    """Assign all rows.

    Args:
        data: the rows.
        centers: ``[K, F]``.
        labels_out: int32 of this rank's rows, filled with their labels; -1 for rows that are not finite.
        with_farthest: also find the rows for clusters that are empty.
        what: name of the walk in a progress bar.
    """
    num_clusters, width = centers.shape
    index = CentroidIndex.build(centers.to(data.work_dtype))
    step = grid_step(farthest_possible(data, centers), data.num_rows)
    if data.device.type == "cpu":
        sums = lazy_zeros(num_clusters, width, torch.float64)
    else:
        sums = torch.zeros(num_clusters, width, dtype=torch.float64, device=data.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=data.device)
    inertia = torch.zeros((), dtype=torch.float64, device=data.device)
    farthest = Farthest(num_clusters, width, data.work_dtype, data.device)
    for first, block in data.blocks(what):
        labels, squared = kmeans_assign(block, index, return_distance=True)
        add_cluster_sums(block, labels, sums, counts, data.grid)
        inertia += to_grid(squared.nan_to_num(nan=0.0).double(), step).sum()
        if with_farthest:
            farthest.add(block, labels, squared)
        if labels_out is not None:
            labels_out[first : first + block.shape[0]] = labels
    data.ranks.sum_(sums, counts, inertia)
    return Walk(sums, counts, float(inertia), farthest)


def farthest_possible(data: Data, centers: Tensor) -> Tensor:
    """No row is farther than this, squared, from the nearest centroid: from box to box, float64 0-dimensional."""
    low, high = centers.amin(dim=0), centers.amax(dim=0)  # aminmax takes three times as long
    reach = torch.maximum((data.high - low.double()).abs(), (high.double() - data.low).abs())
    # Twice, for what the distance's own rounding adds. On the CPU for one order of addition.
    return torch.tensor(2 * sum(reach.square().tolist()), dtype=torch.float64, device=data.device)


def reseed_empty(data: Data, result: Walk) -> int:
    """Give each cluster without rows the farthest row that is left, in ``result.sums`` and ``.counts``.

    A row at distance 0, equal to one already taken, or alone in its cluster is passed over: it would make no
    new centroid or another empty cluster. Then the cluster stays empty, where it was.

    Returns:
        The number of clusters that were without rows.
    """
    empty = (result.counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return 0
    result.farthest.gather(data)
    sums, counts = result.sums, result.counts
    left = counts.tolist()
    labels = result.farthest.labels.tolist()
    rows = data.grid.round(result.farthest.rows)
    taken: set[bytes] = set()
    waiting = iter(empty)
    target = next(waiting)
    for row, label in enumerate(labels):
        key = rows[row].cpu().numpy().tobytes()
        if left[label] <= 1 or key in taken:
            continue
        taken.add(key)
        left[label] -= 1
        counts[label] -= 1
        sums[label] -= rows[row]
        counts[target], sums[target] = 1, rows[row]
        found = next(waiting, None)
        if found is None:
            break
        target = found
    return len(empty)


def _means(data: Data, result: Walk, old: Tensor) -> tuple[Tensor, float]:
    """The new centroids, and their squared shift; a cluster without rows stays where it was."""
    new, shifts = torch.empty_like(old), torch.empty(old.shape[0], dtype=torch.float64, device=old.device)
    # On the CPU a part at a time, which stays in cache.
    rows = max(1, (1 << 17) // old.shape[1]) if old.device.type == "cpu" else old.shape[0]
    for start in range(0, old.shape[0], rows):
        at = slice(start, start + rows)
        counts = result.counts[at, None]
        before = old[at].double()
        means = torch.where(counts > 0, result.sums[at] / counts.clamp(min=1) + data.grid.offset, before)
        new[at] = means
        # Rows are summed by one thread each, in one order.
        shifts[at] = (new[at].double() - before).square_().sum(dim=1)
    # The decision to stop must not hang on the order of addition.
    return new, float(exact_sum(shifts))


def lloyd_step(data: Data, state: State, *, max_iter: int, tolerance: float) -> Step:
    """One iteration, in place.

    Args:
        data: the rows.
        state: centroids, history and ``done``.
        max_iter: iterations after which it is done.
        tolerance: squared shift of all centroids up to which it is done; it also is when no centroid moved.
    """
    what = f"k-means {state.iteration + 1}"
    result = walk(data, state.centers, what=what)
    if bool((result.counts == 0).any()):  # seldom: once more, for the rows that they take
        result = walk(data, state.centers, with_farthest=True, what=what)
    num_empty = reseed_empty(data, result)
    new, shift = _means(data, result, state.centers)
    state.history.append(result.inertia)
    state.iteration += 1
    state.done = shift <= tolerance or state.iteration >= max_iter
    state.centers = new
    return Step(result.inertia, shift, num_empty)
