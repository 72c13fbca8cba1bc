"""Mini-batch K-Means: centroids move a little with each batch, at a rate that falls with the rows they have seen.

Sculley, "Web-scale k-means clustering", WWW 2010, in the form of scikit-learn's MiniBatchKMeans: after a batch a
centroid is the mean of all rows assigned to it so far; centroids that see less than ``reassignment_ratio`` of the
busiest one's rows are moved to rows of the batch; the fit stops when the smoothed inertia of the batches no longer
falls.

The order of rows depends on the seed alone. Rows are cut into segments of 1024 consecutive ones; in each epoch the
segments are shuffled, and so are the rows inside each window of segments (at least four batches). A batch is the next
``batch_size`` rows of that order; the last one of an epoch may be smaller. So files are read in runs of 1024 rows, one
window is in memory, every row is seen once per epoch, and all ranks draw the same batches whatever their shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.kmeans.counter_rng import row_keys
from speechlm_ext.kmeans.fit.fixed_point import exact_sum, grid_step, to_grid
from speechlm_ext.kmeans.fit.lloyd import squared_distance_bound
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.state import State, Step
from speechlm_ext.kmeans.settings import Settings
from speechlm_ext.ops import kmeans_assign

SEGMENT = 1024
_MIN_SEGMENTS = 32


class Batches:
    """The batches of a fit: ``batch_size`` rows over all ranks, in an order of ``seed`` alone."""

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.per_epoch = data.num_batches(batch_size)
        self._segments = max(_MIN_SEGMENTS, -(-4 * batch_size // SEGMENT))
        self._epoch = -1
        self._windows: list[Tensor] = []
        self._ends = [0]
        self._loaded: tuple[int, int] = (-1, -1)
        self._numbers = self._local = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of a batch: ``[n, F]`` in ``data.work_dtype`` and their global numbers, int64 ``[n]``."""
        epoch, batch = divmod(step, self.per_epoch)
        start = batch * self.batch_size
        end = min(self.data.num_rows, start + self.batch_size)
        self._start_epoch(epoch)
        rows, numbers = [], []
        for window, offset in enumerate(self._ends[:-1]):
            part_start, part_end = max(start, offset), min(end, self._ends[window + 1])
            if part_start < part_end:
                self._load(window)
                part = slice(part_start - offset, part_end - offset)
                local = self._local[part]
                is_local = local >= 0
                rows.append(self._rows[local[is_local]])
                numbers.append(self._numbers[part][is_local])
        return torch.cat(rows), torch.cat(numbers)

    def _start_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        num_segments = -(-self.data.num_rows // SEGMENT)
        order = row_keys(self.seed, f"segments/{epoch}", torch.arange(num_segments)).argsort()
        self._windows = list(order.split(self._segments))
        self._ends = [0]
        for window in self._windows:
            sizes = (self.data.num_rows - window * SEGMENT).clamp(max=SEGMENT)
            self._ends.append(self._ends[-1] + int(sizes.sum()))

    def _load(self, window: int) -> None:
        """Load a window: the numbers of its rows in shuffled order, and this rank's rows among them."""
        if self._loaded == (self._epoch, window):
            return
        data, first_row = self.data, self.data.first_row
        parts = [data.no_rows()]
        self._rows = parts[0]  # release the old window before reading the new one
        numbers, local, num_local = [], [], 0
        for segment in self._windows[window].tolist():
            start, end = segment * SEGMENT, min(data.num_rows, (segment + 1) * SEGMENT)
            local_start, local_end = max(start, first_row), min(end, first_row + data.source.num_rows)
            position = torch.full((end - start,), -1, dtype=torch.int64)
            if local_start < local_end:
                blocks = data.source.blocks(local_start - first_row, local_end - first_row, data.block_rows)
                parts += [block.to(device=data.device, dtype=data.work_dtype) for _, block in blocks]
                num_new = local_end - local_start
                position[local_start - start : local_end - start] = torch.arange(num_new) + num_local
                num_local += num_new
            numbers.append(torch.arange(start, end))
            local.append(position)
        window_numbers = torch.cat(numbers)
        order = row_keys(self.seed, f"rows/{self._epoch}", window_numbers).argsort()
        self._numbers = window_numbers[order].to(data.device)
        self._local = torch.cat(local)[order].to(data.device)
        self._rows = torch.cat(parts)
        self._loaded = (self._epoch, window)


def minibatch_step(data: Data, settings: Settings, state: State, block: Tensor, numbers: Tensor) -> Step:
    """Learn in place from this rank's rows of a batch, ``[n, F]`` with the global ``numbers`` ``[n]``."""
    num_clusters, width = state.centers.shape
    sums = torch.zeros(num_clusters, width, dtype=torch.float64, device=data.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=data.device)
    labels, squared = kmeans_assign(block, state.centers.to(data.work_dtype), return_distance=True)
    data.grid.add_sums(block, labels, sums, counts)
    step = grid_step(squared_distance_bound(data, state.centers), data.num_rows)
    inertia = to_grid(squared.nan_to_num(nan=0.0).double(), step).sum()
    data.ranks.sum_(sums, counts, inertia)
    old = state.centers.double()
    new_seen = state.seen + counts
    # (old * seen + sum of the batch) / (seen + rows of the batch), relative to the grid's offset.
    means = ((old - data.grid.offset) * state.seen[:, None] + sums) / new_seen.clamp(min=1)[:, None]
    new = torch.where((counts > 0)[:, None], data.grid.offset + means, old)
    state.seen = new_seen
    num_rows = int(counts.sum())
    num_reassigned = 0
    state.rows_since_reassignment += num_rows
    is_due = state.rows_since_reassignment >= 10 * num_clusters or bool((new_seen == 0).any())
    if settings.reassignment_ratio > 0 and is_due and num_rows:
        state.rows_since_reassignment = 0
        starved = new_seen < settings.reassignment_ratio * new_seen.max()
        order = new_seen.sort(stable=True).indices
        chosen = order[starved[order]][: num_rows // 2]
        keys = row_keys(settings.random_state + state.run, f"reassign/{state.iteration}", numbers)
        num_reassigned = _reassign(data, state, new, chosen, block[labels >= 0], keys[labels >= 0])
    centers = new.to(state.centers.dtype)
    shift = float(exact_sum((centers.double() - old).square()))
    state.centers = centers
    state.iteration += 1
    return Step(float(inertia) / max(1, num_rows), shift, num_reassigned)


def _reassign(data: Data, state: State, centers: Tensor, chosen: Tensor, block: Tensor, keys: Tensor) -> int:
    """Move the ``chosen`` centroids to the batch's rows with the smallest keys, in place; returns how many moved."""
    if chosen.numel() == 0:
        return 0
    smallest = keys.argsort()[: chosen.numel()]
    keys, rows = data.ranks.gather(keys[smallest]), data.ranks.gather(block[smallest])
    chosen = chosen[: keys.shape[0]]
    centers[chosen] = rows[keys.argsort()[: chosen.numel()]].double()
    others = torch.ones_like(state.seen, dtype=torch.bool)
    others[chosen] = False
    # As many rows as the poorest of the others has seen, or it would starve again at once.
    state.seen[chosen] = state.seen[others].min()
    return int(chosen.numel())


def update_stopping(data: Data, settings: Settings, state: State, step: Step) -> None:
    """Update the smoothed inertia and ``state.done`` after a step (scikit-learn's rule)."""
    batch_size = min(settings.batch_size, data.num_rows)
    tolerance = settings.tol * data.mean_variance
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
        if settings.max_no_improvement is not None and state.num_stale >= settings.max_no_improvement:
            state.done = True
    state.history.append((state.smoothed if state.smoothed is not None else step.inertia) * data.num_usable)
    max_steps = settings.max_iter * data.num_batches(batch_size)
    state.done = state.done or state.iteration >= max_steps
