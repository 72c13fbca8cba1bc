"""Memory of large results on the CPU, where page faults cost more than writing the values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
#: Matrix products into memory that is not aligned to a cache line are a third slower; NumPy's memory is not aligned.
_CACHE_LINE = 64


def lazy_zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[num_rows, width]`` on the CPU, whose pages are allocated when they are first written.

    A dense gradient of a large table is zero nearly everywhere: writing those zeros would dominate its cost.
    """
    size = num_rows * width * dtype.itemsize
    if size == 0:
        return torch.zeros(num_rows, width, dtype=dtype)
    return _aligned(np.zeros(size + _CACHE_LINE, np.uint8), size, dtype).view(num_rows, width)


def empty_in_huge_pages(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """`torch.empty`, on the CPU from NumPy if it is large, which requests huge pages.

    Each page of the result is written once; with small pages the page faults cost more than the values.
    """
    size = num_rows * width * dtype.itemsize
    if size < 2 * _HUGE_PAGE or torch.device(device).type != "cpu":
        return torch.empty(num_rows, width, dtype=dtype, device=device)
    return _aligned(np.empty(size + _CACHE_LINE, np.uint8), size, dtype).view(num_rows, width)


def _aligned(memory: np.ndarray, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` bytes of ``memory`` from the first start of a cache line."""
    start = -memory.ctypes.data % _CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype)
