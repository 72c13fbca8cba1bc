"""Checks and conversions that the arguments of `delay_pack` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe

ID_DTYPES = (torch.int32, torch.int64)
MAX_STREAMS = 64
_LIMITS = {dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in ID_DTYPES}

#: S values, or ``[n, S]``.
PerSegment: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
#: One list of ids for all segments, one list per segment, or ``(ids, offsets)``.
Specials: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | tuple[Tensor, Tensor] | Tensor
SpecialWeight: TypeAlias = float | Sequence[float] | Tensor


def check_segment(name: str, ids: Tensor, num_streams: int, narrow: bool = False) -> None:
    """Check that ``ids`` is int32 or int64 ``[frames, S]``; with ``narrow``, ``[frames, 1 to S]``."""
    if not isinstance(ids, Tensor):
        raise OpError(f"{name} must be a tensor; got {describe(ids)}")
    if ids.dtype not in ID_DTYPES or ids.dim() != 2:
        raise OpError(f"{name} must be int32 or int64 [frames, {num_streams}]; got {describe(ids)}")
    streams = ids.shape[1]
    if streams != num_streams and not (narrow and 1 <= streams < num_streams):
        raise OpError(f"{name} has {streams} streams but delays has {num_streams}; got {describe(ids)}")


def check_fits(ids: Sequence[int] | Tensor, name: str, dtype: torch.dtype) -> None:
    """Check that ``dtype`` can hold ``ids``."""
    low, high = _LIMITS[dtype]
    if isinstance(ids, Tensor):
        if torch.compiler.is_compiling() or ids.numel() == 0 or dtype == torch.int64:
            return
        smallest, largest = (int(v) for v in ids.aminmax())
        if smallest < low or largest > high:
            raise OpError(f"delay_pack: ids of {name} from {smallest} to {largest} do not fit {dtype}")
        return
    for s, value in enumerate(ids):
        if not low <= value <= high:
            raise OpError(f"delay_pack: {name}[{s}] = {value} does not fit {dtype}")


def host_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """``values`` as a tensor on the host."""
    if type(values) is Tensor and values.dtype == dtype and values.device.type == "cpu":
        return values
    out = values.detach().to("cpu") if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    if dtype == torch.int64 and out.is_floating_point() and out.numel():
        raise OpError(f"delay_pack: integers are needed; got {describe(out)}")
    return out.to(dtype)
