"""CUDA graphs of the decode step: one launch instead of hundreds, for each size.

A graph is captured for a number of rows, and the calls and products of the head that are read. Rows are rounded up to a
power of two, or always as many as there are slots, so that few graphs serve all batches; slots without a request emit
padding and stay empty. Lengths, blocks of the cache and row counters are read on the device, so a graph serves requests
of every length, and each replay draws new random numbers.

A capture takes as long as several steps, which a listener would hear. So the sizes that requests can reach are captured
when they start, before their first row (:meth:`StepGraphs.prepare`), and any other size runs without a graph. A batch
that nobody listens to may capture at any time: a size that recurs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from speechlm_ext.generation.engine.capture import GraphCapture
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.ops import SampledStep

#: For each call of the head in a step, the products that are read (None: all). A model with a frame transformer has one
#: call for each sampled stream, others one for all.
HeadCalls = tuple[tuple[bool, ...] | None, ...]
Size = tuple[int, HeadCalls]


class StepGraphs:
    """The captured steps of an engine. Without ``capture``, as on the CPU, the same padded sizes run uncaptured.

    Args:
        step: computes one step for a number of rows and calls of the head.
        cache: of keys and values, which the steps read and write.
        num_slots: maximum number of rows of a step.
        capture: makes the graphs.
        fewest_rows: minimum number of rows of a step.
    """

    def __init__(
        self,
        step: Callable[[int, HeadCalls], SampledStep],
        cache: KVCache,
        num_slots: int,
        capture: GraphCapture | None = None,
        fewest_rows: int = 1,
    ) -> None:
        self._step, self._cache, self._num_slots, self._capture = step, cache, num_slots, capture
        self._fewest_rows = fewest_rows
        self._seen: set[Size] = set()
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, SampledStep]] = {}
        self._rows = 0

    @property
    def sizes(self) -> list[Size]:
        """The captured sizes, in the order of their captures."""
        return list(self._graphs)

    @property
    def captures(self) -> bool:
        """Whether steps are captured at all."""
        return self._capture is not None

    def forget(self) -> None:
        """Drop all graphs; needed when memory that they use is replaced."""
        self._graphs.clear()
        if self._capture is not None:
            self._capture.forget()

    def prepare(self, slots: range, calls: HeadCalls) -> None:
        """Capture the sizes of steps of ``slots`` requests.

        Each step is also run once, so the caller keeps what steps change: the sampler's state, and the cache's row
        after those that each slot has.
        """
        if self._capture is None or not slots:
            return
        self._check_memory()
        for num_rows in sorted({self._padded(n) for n in slots}, reverse=True):
            size = num_rows, calls
            if size not in self._graphs:
                self._capture.warm_up(partial(self._undone, size))
                self._graphs[size] = self._capture.capture(partial(self._uncounted, size))

    def step(self, num_active: int, calls: HeadCalls, may_capture: bool = False) -> SampledStep:
        """Run a step for ``num_active`` requests, padded to a size of graphs.

        Args:
            may_capture: capture a size that recurs.
        """
        size = self._padded(num_active), calls
        self._cache.reserve(self._cache.longest(num_active) + 1)
        self._check_memory()
        if size not in self._graphs:
            if self._capture is None or not may_capture or size not in self._seen:
                self._seen.add(size)
                return self._step(*size)
            self._graphs[size] = self._capture.capture(partial(self._uncounted, size))
        self._cache.count_step(size[0])
        graph, out = self._graphs[size]
        graph.replay()
        return out

    def _padded(self, num_active: int) -> int:
        return min(max(1 << (num_active - 1).bit_length(), self._fewest_rows), self._num_slots)

    def _undone(self, size: Size) -> None:
        """A step whose rows do not count."""
        lengths = self._cache.lengths.clone()
        self._uncounted(size)
        self._cache.lengths.copy_(lengths)

    def _uncounted(self, size: Size) -> SampledStep:
        """A step whose rows the host does not count."""
        held = list(self._cache.held)
        try:
            return self._step(*size)
        finally:
            self._cache.held[:] = held

    def _check_memory(self) -> None:
        """Drop all graphs if the cache has grown since they were captured."""
        if self._cache.num_rows != self._rows:
            self._rows = self._cache.num_rows
            self.forget()
