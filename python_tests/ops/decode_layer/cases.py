"""Inputs and comparisons of the decode layer's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: Steps of one request, a few, a whole tile, one more, and several tiles.
NUM_ROWS = [0, 1, 2, 5, 16, 17, 33]
SETS = [name for name in native.simd_available() if name != "amx"]


def assert_close(got: Tensor, exact: Tensor, roundings: int = 2, terms: int = 1) -> None:
    """``got`` is the float64 tensor ``exact`` up to some roundings to its dtype, and float32 sums of some terms."""
    assert got.shape == exact.shape
    eps = torch.finfo(got.dtype).eps
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(got.double(), exact, rtol=roundings * eps, atol=scale * wide * (4 + terms))


def make_cache(
    num_slots: int, num_rows: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(num_slots, num_rows, heads, key_size).to(dtype),
        torch.randn(num_slots, num_rows, heads, value_size).to(dtype),
    )
