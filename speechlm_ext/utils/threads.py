"""One torch thread for a block of code."""

from __future__ import annotations

import threading

import torch


class _OneThread:
    """Runs torch on one thread while at least one block is active.

    The number of threads belongs to the process, so blocks that overlap are counted: the first one sets it, the last
    one restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._num_threads = 1

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._num_threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                torch.set_num_threads(self._num_threads)


_ONE_THREAD = _OneThread()


def one_thread() -> _OneThread:
    """Context manager that runs torch on one thread.

    FFTs of short frames are up to 30 times slower on several threads, and results then do not depend on the number of
    cores.
    """
    return _ONE_THREAD
