"""Large results on the CPU: their memory is new, and what the system does for each page costs more than writing it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def lazy_zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose memory the operating system hands out page by page, when it is first written.

    A dense gradient of a large table is zero nearly everywhere: writing those zeros would cost more than the rest.
    """
    size = num_rows * width * dtype.itemsize
    if size == 0:
        return torch.zeros(num_rows, width, dtype=dtype)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(num_rows, width)


def empty_in_huge_pages(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU, but a large one comes from NumPy, which asks for huge pages.

    Every page of the result is new and is written once; with small pages that costs more than the values.
    """
    size = num_rows * width * dtype.itemsize
    if size < 2**22:
        return torch.empty(num_rows, width, dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(num_rows, width)
