"""CUDA graphs that share one memory pool, captured without the stalls of ``torch.cuda.graph``.

``torch.cuda.graph`` waits for the device, frees cached memory and, in older versions of torch, collects garbage before
each capture, which takes tens to hundreds of milliseconds. Nothing of it is needed here: a graph's memory comes from
the pool, and the capture waits for the current stream on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class GraphCapture:
    """Captures calls on one device.

    The graphs reuse each other's memory, so they may only be replayed one after the other, and what one returned is
    overwritten by the next.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def forget(self) -> None:
        """Leave the pool to the graphs captured so far; it is freed with the last of them."""
        self._pool = None

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once without capture, on the stream of the captures: libraries initialize, which cannot be captured."""
        with self._side_stream():
            run()

    def capture(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Capture a call without running it: the graph, and what the call returned, which each replay fills."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with self._side_stream():
            # Other threads may allocate and synchronize meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says no more than the first error
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, out

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        """The stream of the captures, ordered before and after the current one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)
