"""CUDA graphs of the decode step: one launch instead of hundreds, for each size.

A graph is captured for a number of slots, a number of keys, and the calls and products of the head that are read. Slots
are rounded up to a power of two and keys to a multiple of 256, so that few graphs serve all batches: slots without a
request emit padding, and keys after a request's rows are masked. Random numbers depend on row counters on the device,
so each replay draws new ones.

A capture takes as long as several steps, which a listener would hear. So the sizes that requests can reach are captured
when they start, before their first row (:meth:`StepGraphs.prepare`), and any other size runs without a graph. A batch
that nobody listens to may capture at any time: a size that recurs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from speechlm_ext.generation.engine.capture import GraphCapture
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.ops import SampledStep

KEYS = 256
#: Maximum number of captures before a request's first row, which bounds the time until then.
MAX_PREPARED = 16
#: For each call of the head in a step, the products that are read (None: all). A model with a frame transformer has one
#: call for each sampled stream, others one for all.
HeadCalls = tuple[tuple[bool, ...] | None, ...]
Size = tuple[int, int, HeadCalls]


def whole_keys(num_rows: int) -> int:
    """Keys of a step that reads ``num_rows`` rows."""
    return -(-num_rows // KEYS) * KEYS


class StepGraphs:
    """The captured steps of an engine. Without ``capture``, as on the CPU, the same padded sizes run uncaptured.

    Args:
        step: computes one step for a number of slots, a number of keys, and calls of the head.
        cache: of keys and values, which the steps read and write.
        num_slots: maximum number of slots of a step.
        capture: makes the graphs.
    """

    def __init__(
        self,
        step: Callable[[int, int, HeadCalls], SampledStep],
        cache: KVCache,
        num_slots: int,
        capture: GraphCapture | None = None,
    ) -> None:
        self._step, self._cache, self._num_slots, self._capture = step, cache, num_slots, capture
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

    def prepare(self, slots: range, rows: range, calls: HeadCalls) -> None:
        """Capture the sizes of steps of ``slots`` requests that read ``rows`` rows: first those of few rows, and among
        them those of many requests.

        Each step is also run once, so the caller keeps what steps change: the sampler's state, and the cache's row
        after those that each slot has. At most ``MAX_PREPARED`` are captured; later sizes run without a graph.
        """
        if self._capture is None or not slots or not rows:
            return
        self._check_memory()
        padded = sorted({self._padded(n) for n in slots}, reverse=True)
        keys = range(whole_keys(rows[0]), whole_keys(rows[-1]) + 1, KEYS)
        wanted = [(n, k, calls) for k, n in itertools.product(keys, padded)]
        for size in [size for size in wanted if size not in self._graphs][:MAX_PREPARED]:
            self._capture.warm_up(partial(self._undone, size))
            self._graphs[size] = self._capture.capture(partial(self._uncounted, size))

    def step(self, num_active: int, calls: HeadCalls, may_capture: bool = False) -> SampledStep:
        """Run a step for ``num_active`` requests, padded to a size of graphs.

        Args:
            may_capture: capture a size that recurs.
        """
        cache = self._cache
        size = self._padded(num_active), whole_keys(cache.longest(num_active) + 1), calls
        cache.reserve(size[1])
        self._check_memory()
        if size not in self._graphs:
            if self._capture is None or not may_capture or size not in self._seen:
                self._seen.add(size)
                return self._step(*size)
            self._graphs[size] = self._capture.capture(partial(self._uncounted, size))
        cache.count_step(size[0])
        graph, out = self._graphs[size]
        graph.replay()
        return out

    def _padded(self, num_active: int) -> int:
        return min(1 << (num_active - 1).bit_length(), self._num_slots)

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
