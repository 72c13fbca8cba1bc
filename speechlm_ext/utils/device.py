"""Devices that settings name, and torch on one thread for a block of code."""

from __future__ import annotations

import re
import threading
from typing import Any

import torch

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.text import counted


def resolve_device(device: Any, error: type[SpeechLMError]) -> torch.device:
    """The device of a setting: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU where there is one.

    Raises ``error``: another device, or a GPU that this machine does not have.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", str(device)) is None:
        raise error(f"device must be cpu, cuda, cuda:N or auto, got {device!r}.", argument="device")
    if str(device) == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    # A device is returned itself: scikit-learn's clone compares arguments by identity.
    found = device if isinstance(device, torch.device) else torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        available = f"only {counted(num_gpus, 'GPU')}, counted from 0" if num_gpus else "no GPU"
        raise error(
            f"device {found} is not available: torch finds {available}. See `speechlm doctor`, or use cpu.",
            argument="device",
        )
    return found


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
