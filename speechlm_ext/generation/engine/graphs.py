"""CUDA graphs of the decode step: one launch instead of hundreds, for each size.

A graph is captured for a number of slots, a number of keys, and the calls and products of the head that are read. Slots
are rounded up to a power of two and keys to a multiple of 256, so that few graphs serve all batches: slots without a
request emit padding, and keys after a request's rows are masked. A size runs once without a graph, in which libraries
initialize, and is captured when it recurs. Random numbers depend on row counters on the device, so each replay draws
new ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.ops import SampledStep

KEYS = 256
#: For each call of the head in a step, the products that are read (None: all). A model with a frame transformer has one
#: call for each sampled stream, others one for all.
HeadCalls = tuple[tuple[bool, ...] | None, ...]
Size = tuple[int, int, HeadCalls]


class StepGraphs:
    """The captured steps of an engine. On the CPU the same padded sizes run without capture.

    Args:
        step: computes one step for a number of slots, a number of keys, and calls of the head.
        cache: of keys and values, which the steps read and write.
        num_slots: maximum number of slots of a step.
    """

    def __init__(
        self, step: Callable[[int, int, HeadCalls], SampledStep], cache: KVCache, num_slots: int
    ) -> None:
        self._step, self._cache, self._num_slots = step, cache, num_slots
        self._seen: set[Size] = set()
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, SampledStep]] = {}
        self._rows = 0

    def forget(self) -> None:
        """Drop all graphs; needed when memory that they use is replaced."""
        self._graphs.clear()

    def step(self, num_active: int, calls: HeadCalls) -> SampledStep:
        """Run a step for ``num_active`` requests, padded to a captured size."""
        cache = self._cache
        n = min(1 << (num_active - 1).bit_length(), self._num_slots)
        num_keys = -(-(cache.longest(num_active) + 1) // KEYS) * KEYS
        cache.reserve(num_keys)
        if cache.num_rows != self._rows:
            self._rows = cache.num_rows
            self.forget()
        size = n, num_keys, calls
        if cache.device.type != "cuda" or size not in self._seen:
            self._seen.add(size)
            return self._step(n, num_keys, calls)
        if size not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._step(n, num_keys, calls)
            self._graphs[size] = graph, out
        else:
            cache.count_step(n)
        graph, out = self._graphs[size]
        graph.replay()
        return out
