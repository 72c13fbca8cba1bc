"""Mini-batch K-Means: centroids move a little with each batch, by a rate that falls with the rows they have seen.

Sculley, "Web-scale k-means clustering", WWW 2010, in the form of scikit-learn's MiniBatchKMeans: after a batch a
centroid is the mean of all rows it was ever given; centroids that see less than ``reassignment_ratio`` of the busiest
one's rows are moved to rows of the batch; the fit stops when the smoothed inertia of the batches no longer falls.

The order of rows depends on the seed alone. Rows are cut into segments of 1024 consecutive ones; in each epoch the
segments are shuffled, and so are the rows inside each window of segments (at least four batches). A batch is the next
``batch_size`` rows of that order, the last of an epoch what is left. So files are read in runs of 1024 rows, one window
is in memory, every row is seen once an epoch, and ranks that hold other parts of the data draw the same batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.kmeans.counter_rng import row_keys
from speechlm_ext.kmeans.fit.fixed_point import add_cluster_sums, exact_sum, grid_step, to_grid
from speechlm_ext.kmeans.fit.lloyd import farthest_possible
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.state import State, Step
from speechlm_ext.ops import kmeans_assign

SEGMENT = 1024
_LEAST_SEGMENTS = 32


class Batches:
    """The batches of a fit.

    Args:
        data: the rows.
        batch_size: rows of a batch over all ranks.
        seed: of the order.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.per_epoch = -(-data.num_rows // batch_size)
        self._segments = max(_LEAST_SEGMENTS, -(-4 * batch_size // SEGMENT))
        self._epoch = -1
        self._windows: list[Tensor] = []
        self._ends = [0]
        self._held: tuple[int, int] = (-1, -1)
        self._numbers = self._local = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of a batch: ``[n, F]`` in ``data.work_dtype`` and their global numbers, int64 ``[n]``."""
        epoch, at = divmod(step, self.per_epoch)
        start = at * self.batch_size
        stop = min(self.data.num_rows, start + self.batch_size)
        self._begin(epoch)
        rows, numbers = [], []
        for window in range(len(self._windows)):
            first, last = max(start, self._ends[window]), min(stop, self._ends[window + 1])
            if first < last:
                self._load(window)
                part = slice(first - self._ends[window], last - self._ends[window])
                local = self._local[part]
                held = local >= 0
                rows.append(self._rows[local[held]])
                numbers.append(self._numbers[part][held])
        return torch.cat(rows), torch.cat(numbers)

    def _begin(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        total = -(-self.data.num_rows // SEGMENT)
        order = row_keys(self.seed, f"segments/{epoch}", torch.arange(total)).argsort()
        self._windows = list(order.split(self._segments))
        self._ends = [0]
        for window in self._windows:
            sizes = (self.data.num_rows - window * SEGMENT).clamp(max=SEGMENT)
            self._ends.append(self._ends[-1] + int(sizes.sum()))

    def _load(self, window: int) -> None:
        """Hold a window: numbers of its rows in shuffled order, and this rank's rows among them."""
        if self._held == (self._epoch, window):
            return
        data, (begin, end) = self.data, (self.data.first_row, self.data.first_row + self.data.source.num_rows)
        numbers, parts = (
            [],
            [torch.empty(0, data.source.num_features, dtype=data.work_dtype, device=data.device)],
        )
        self._rows = parts[0]  # let the old window go before the new one comes
        positions, at = [], 0
        for segment in self._windows[window].tolist():
            first, last = segment * SEGMENT, min(data.num_rows, (segment + 1) * SEGMENT)
            numbers.append(torch.arange(first, last))
            mine = max(first, begin), min(last, end)
            position = torch.full((last - first,), -1, dtype=torch.int64)
            if mine[0] < mine[1]:
                for _, block in data.source.blocks(mine[0] - begin, mine[1] - begin, data.block_rows):
                    parts.append(block.to(device=data.device, dtype=data.work_dtype))
                position[mine[0] - first : mine[1] - first] = torch.arange(at, at + mine[1] - mine[0])
                at += mine[1] - mine[0]
            positions.append(position)
        ordered = torch.cat(numbers)
        order = row_keys(self.seed, f"rows/{self._epoch}", ordered).argsort()
        self._numbers, self._local = (
            ordered[order].to(data.device),
            torch.cat(positions)[order].to(data.device),
        )
        self._rows = torch.cat(parts)
        self._held = (self._epoch, window)


def minibatch_step(
    data: Data, state: State, block: Tensor, numbers: Tensor, *, seed: int, reassignment_ratio: float
) -> Step:
    """Learn from one batch, in place.

    Args:
        data: of which the batch is a part: its range, number of rows, ranks.
        state: centroids, ``seen`` and the counter of reassignments.
        block: this rank's rows of the batch, ``[n, F]`` in ``data.work_dtype``.
        numbers: int64 ``[n]``, their global numbers.
        seed: of the rows that starved centroids move to.
        reassignment_ratio: share of the busiest centroid's rows below which one is starved; 0 leaves all.

    Returns:
        The inertia per finite row of the batch before the step, the squared movement, the centroids reassigned.
    """
    num_clusters, width = state.centers.shape
    sums = torch.zeros(num_clusters, width, dtype=torch.float64, device=data.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=data.device)
    labels, squared = kmeans_assign(block, state.centers.to(data.work_dtype), return_distance=True)
    add_cluster_sums(block, labels, sums, counts, data.grid)
    step = grid_step(farthest_possible(data, state.centers), data.num_rows)
    inertia = to_grid(squared.nan_to_num(nan=0.0).double(), step).sum()
    data.ranks.sum_(sums, counts, inertia)
    old = state.centers.double()
    new_seen = state.seen + counts
    # (old * seen + sum of the batch) / (seen + rows of the batch), around the grid's offset.
    pulled = ((old - data.grid.offset) * state.seen[:, None] + sums) / new_seen.clamp(min=1)[:, None]
    new = torch.where((counts > 0)[:, None], data.grid.offset + pulled, old)
    state.seen = new_seen
    num_rows = int(counts.sum())
    num_moved = 0
    state.rows_since_reassignment += num_rows
    due = state.rows_since_reassignment >= 10 * num_clusters or bool((new_seen == 0).any())
    if reassignment_ratio > 0 and due and num_rows:
        state.rows_since_reassignment = 0
        new, num_moved = _reassign(
            data, state, new, block[labels >= 0], numbers[labels >= 0], num_rows, seed, reassignment_ratio
        )
    centers = new.to(state.centers.dtype)
    shift = float(exact_sum((centers.double() - old).square()))
    state.centers = centers
    state.iteration += 1
    return Step(float(inertia) / max(1, num_rows), shift, num_moved)


def _reassign(
    data: Data,
    state: State,
    new: Tensor,
    block: Tensor,
    numbers: Tensor,
    num_rows: int,
    seed: int,
    ratio: float,
) -> tuple[Tensor, int]:
    """Move starved centroids, at most half as many as the batch has rows, to rows of the batch."""
    starved = state.seen < ratio * state.seen.max()
    order = state.seen.sort(stable=True).indices
    moved = order[starved[order]][: num_rows // 2]
    if moved.numel() == 0:
        return new, 0
    keys = row_keys(seed, f"reassign/{state.iteration}", numbers)
    best = keys.argsort()[: moved.numel()]
    keys, rows = data.ranks.gather(keys[best]), data.ranks.gather(block[best])
    moved = moved[: keys.shape[0]]
    stays = torch.ones_like(starved)
    stays[moved] = False
    new[moved] = rows[keys.argsort()[: moved.numel()]].double()
    # As many rows as the poorest of the others has seen, or it would starve again at once.
    state.seen[moved] = state.seen[stays].min()
    return new, int(moved.numel())


def judge_progress(
    data: Data,
    state: State,
    step: Step,
    *,
    batch_size: int,
    max_steps: int,
    tolerance: float,
    max_no_improvement: int | None,
) -> None:
    """Set ``state.done``, and the smoothed inertia that it follows from (scikit-learn's rule)."""
    if state.iteration > 1:  # the first batch only shows how good the start was
        alpha = min(1.0, 2 * batch_size / (data.num_usable + 1))
        before = step.inertia if state.smoothed is None else state.smoothed
        state.smoothed = before * (1 - alpha) + step.inertia * alpha
        if state.lowest is None or state.smoothed < state.lowest:
            state.lowest, state.num_stale = state.smoothed, 0
        else:
            state.num_stale += 1
        if 0.0 < tolerance and step.shift <= tolerance:
            state.done = True
        if max_no_improvement is not None and state.num_stale >= max_no_improvement:
            state.done = True
    state.history.append((state.smoothed if state.smoothed is not None else step.inertia) * data.num_usable)
    state.done = state.done or state.iteration >= max_steps
