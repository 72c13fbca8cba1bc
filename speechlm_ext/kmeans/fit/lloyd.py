"""Lloyd's algorithm: assign every row to its nearest centroid, move every centroid to the mean of its rows.

Lloyd, "Least squares quantization in PCM", 1982. Labels are the exact float64 argmin, sums are exact fixed-point sums
(``fixed_point.py``), so an iteration has the same bits for any blocks, threads and ranks. A cluster without rows takes
the row farthest from its own centroid, as in scikit-learn: the row's weight leaves the cluster it was in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.kmeans.fit.fixed_point import exact_sum, grid_step, to_grid
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.state import State, Step
from speechlm_ext.ops import CentroidIndex, kmeans_assign
from speechlm_ext.ops.common.memory import lazy_zeros


class Farthest:
    """The ``limit`` rows farthest from their own centroids; ties by row number, equal rows once.

    It holds up to ``limit * F`` values, as many as the centroids.
    """

    def __init__(self, limit: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.limit = limit
        self.distances = torch.empty(0, dtype=dtype, device=device)
        self.labels = torch.empty(0, dtype=torch.int32, device=device)
        self.rows = torch.empty(0, width, dtype=dtype, device=device)

    def add(self, block: Tensor, labels: Tensor, distances: Tensor) -> None:
        """Add a block: rows ``[n, F]``, labels int32 ``[n]``, distances ``[n]``; blocks come in order of their rows."""
        # A later row with an equal distance ranks behind, so a full list admits only larger ones. NaN never enters.
        threshold = self.distances[-1] if self.distances.shape[0] == self.limit else 0.0
        new = (distances > threshold).nonzero()[:, 0]
        if new.numel() == 0:
            return
        old_rows, num_old = self.rows, self.distances.shape[0]

        def take(places: Tensor) -> Tensor:
            """Rows by place among the old and then the new ones; few are needed, so these are not concatenated."""
            is_old = places < num_old
            rows = old_rows.new_empty(places.shape[0], old_rows.shape[1])
            rows[is_old] = old_rows[places[is_old]]
            rows[~is_old] = block[new[places[~is_old] - num_old]]
            return rows

        self._select(torch.cat([self.distances, distances[new]]), torch.cat([self.labels, labels[new]]), take)

    def gather(self, data: Data) -> None:
        """Keep the farthest of all ranks; they come in rank order, so ties still go to the lowest row."""
        rows = data.ranks.gather(self.rows)
        self._select(data.ranks.gather(self.distances), data.ranks.gather(self.labels), rows.__getitem__)

    def _select(self, distances: Tensor, labels: Tensor, take: Callable[[Tensor], Tensor]) -> None:
        distances, order = distances.sort(descending=True, stable=True)
        # Equal rows, such as digital silence, would fill the list. Their distances are equal, so they are neighbors.
        tied = (distances[1:] == distances[:-1]).nonzero()[:, 0] + 1
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[tied] = (take(order[tied]) != take(order[tied - 1])).any(dim=1)
        order = order[is_first][: self.limit]
        self.distances, self.labels, self.rows = distances[is_first][: self.limit], labels[order], take(order)


@dataclass
class PassResult:
    """Result of one pass over all rows, summed over all ranks."""

    sums: Tensor
    """float64 ``[K, F]`` on ``data.grid``."""
    counts: Tensor
    """int64 ``[K]``."""
    inertia: float
    """Sum of squared distances to the nearest centroid."""
    farthest: Farthest


def assign_pass(
    data: Data,
    centers: Tensor,
    *,
    labels_out: Tensor | None = None,
    with_farthest: bool = False,
    name: str = "k-means",
) -> PassResult:
    """Assign all rows to the nearest of ``centers`` ``[K, F]``; ``name`` is of the progress bar.

    ``labels_out`` receives int32 labels of this rank's rows, -1 for rows that are not finite; ``with_farthest`` also
    finds candidates for empty clusters.
    """
    num_clusters, width = centers.shape
    index = CentroidIndex.build(centers.to(data.work_dtype))
    step = grid_step(squared_distance_bound(data, centers), data.num_rows)
    if data.device.type == "cpu":
        sums = lazy_zeros(num_clusters, width, torch.float64)
    else:
        sums = torch.zeros(num_clusters, width, dtype=torch.float64, device=data.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=data.device)
    inertia = torch.zeros((), dtype=torch.float64, device=data.device)
    farthest = Farthest(num_clusters, width, data.work_dtype, data.device)
    for first, block in data.blocks(name):
        labels, squared = kmeans_assign(block, index, return_distance=True)
        data.grid.add_sums(block, labels, sums, counts)
        inertia += to_grid(squared.nan_to_num(nan=0.0).double(), step).sum()
        if with_farthest:
            farthest.add(block, labels, squared)
        if labels_out is not None:
            labels_out[first : first + block.shape[0]] = labels
    data.ranks.sum_(sums, counts, inertia)
    return PassResult(sums, counts, float(inertia), farthest)


def squared_distance_bound(data: Data, centers: Tensor) -> Tensor:
    """Upper bound of any row's squared distance to its nearest centroid, from their ranges; float64, 0-dimensional."""
    low, high = centers.amin(dim=0), centers.amax(dim=0)  # aminmax takes three times as long
    reach = torch.maximum((data.high - low.double()).abs(), (high.double() - data.low).abs())
    # Twice, for the rounding of the distance itself. A Python sum has one order of addition.
    return torch.tensor(2 * sum(reach.square().tolist()), dtype=torch.float64, device=data.device)


def reseed_empty(data: Data, result: PassResult) -> int:
    """Give clusters without rows the farthest rows available, in place; returns their number.

    Rows at distance 0, equal to one already taken, or alone in their cluster are skipped: they would make no new
    centroid or another empty cluster. A cluster for which no row is left keeps its centroid.
    """
    empty = (result.counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return 0
    result.farthest.gather(data)
    sums, counts = result.sums, result.counts
    num_left = counts.tolist()
    rows = data.grid.round(result.farthest.rows)
    taken: set[bytes] = set()
    targets = iter(empty)
    for row, label in zip(rows, result.farthest.labels.tolist(), strict=True):
        key = row.cpu().numpy().tobytes()
        if num_left[label] <= 1 or key in taken:
            continue
        target = next(targets, None)
        if target is None:
            break
        taken.add(key)
        num_left[label] -= 1
        counts[label] -= 1
        sums[label] -= row
        counts[target], sums[target] = 1, row
    return len(empty)


def _means(data: Data, result: PassResult, old: Tensor) -> tuple[Tensor, float]:
    """The new centroids and their squared shift; a cluster without rows keeps its centroid."""
    new, shifts = torch.empty_like(old), torch.empty(old.shape[0], dtype=torch.float64, device=old.device)
    # On the CPU in parts that fit into cache.
    rows = max(1, (1 << 17) // old.shape[1]) if old.device.type == "cpu" else old.shape[0]
    for start in range(0, old.shape[0], rows):
        part = slice(start, start + rows)
        counts = result.counts[part, None]
        before = old[part].double()
        means = torch.where(counts > 0, result.sums[part] / counts.clamp(min=1) + data.grid.offset, before)
        new[part] = means
        # Rows are summed by one thread each, in one order.
        shifts[part] = (new[part].double() - before).square_().sum(dim=1)
    # The decision to stop must not depend on the order of addition.
    return new, float(exact_sum(shifts))


def lloyd_step(data: Data, state: State, *, max_iter: int, tolerance: float) -> Step:
    """One iteration, in place; the last at ``max_iter`` or at a squared shift of at most ``tolerance``."""
    name = f"k-means {state.iteration + 1}"
    result = assign_pass(data, state.centers, name=name)
    if bool((result.counts == 0).any()):  # rare: a second pass finds the rows that the empty clusters take
        result = assign_pass(data, state.centers, with_farthest=True, name=name)
    num_empty = reseed_empty(data, result)
    new, shift = _means(data, result, state.centers)
    state.history.append(result.inertia)
    state.iteration += 1
    state.done = shift <= tolerance or state.iteration >= max_iter
    state.centers = new
    return Step(result.inertia, shift, num_empty)
