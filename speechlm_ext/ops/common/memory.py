"""Large results on the CPU: their memory is new, and what the system does for each page costs more than writing it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
#: Matrix products into memory that does not start on a cache line are a third slower. NumPy's memory does not.
_CACHE_LINE = 64


def lazy_zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose memory the operating system hands out page by page, when it is first written.

    A dense gradient of a large table is zero nearly everywhere: writing those zeros would cost more than the rest.
    """
    size = num_rows * width * dtype.itemsize
    if size == 0:
        return torch.zeros(num_rows, width, dtype=dtype)
    return _aligned(np.zeros(size + _CACHE_LINE, np.uint8), size, dtype).view(num_rows, width)


def empty_in_huge_pages(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """As `torch.empty`, but a large one on the CPU comes from NumPy, which asks for huge pages.

    Every page of the result is new and is written once; with small pages that costs more than the values.
    """
    size = num_rows * width * dtype.itemsize
    if size < 2 * _HUGE_PAGE or torch.device(device).type != "cpu":
        return torch.empty(num_rows, width, dtype=dtype, device=device)
    return _aligned(np.empty(size + _CACHE_LINE, np.uint8), size, dtype).view(num_rows, width)


def _aligned(memory: np.ndarray, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` bytes of ``memory``, from the start of a cache line on."""
    start = -memory.ctypes.data % _CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype)
