"""The arguments of `delay_pack`, checked and converted one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.ops.common.native import ID_DTYPES, OpError, describe, int_list

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


class Segments(NamedTuple):
    """The segments of either form."""

    ids: Tensor | list[Tensor]
    """One tensor ``[ΣT, S]`` of consecutive segments, or one ``[T_i, C_i]`` per segment."""
    dtype: torch.dtype
    offsets: Tensor
    """int64 ``[n + 1]`` on the host: frame at which each segment starts."""
    num_frames: int
    widths: list[int] | None
    """Streams of each segment; None: all have S."""


def read_shifts(
    delays: Sequence[int], pad_ids: Sequence[int], tail_ids: Sequence[int] | None
) -> tuple[list[int], list[int], list[int]]:
    """Delays, pad ids and tail ids as lists."""
    delays = int_list(delays, "delay_pack: delays")
    S = len(delays)
    if S == 0:
        raise OpError("delay_pack: delays must have at least one value")
    if S > MAX_STREAMS:
        raise OpError(f"delay_pack: there must be 1 to {MAX_STREAMS} streams; got {S}")
    if min(delays) < 0:
        raise OpError(f"delay_pack: delays must be 0 or more rows; got {delays}")
    pad_ids = int_list(pad_ids, "delay_pack: pad_ids", S)
    return delays, pad_ids, pad_ids if tail_ids is None else int_list(tail_ids, "delay_pack: tail_ids", S)


def read_tail_rows(tail: str | int, max_delay: int) -> int:
    """Rows after a segment's last frame."""
    if isinstance(tail, (int, np.integer)) and not isinstance(tail, bool):
        if not 0 <= tail <= max_delay:
            raise OpError(f"delay_pack: tail must be 0 to {max_delay} rows, the largest delay; got {tail}")
        return int(tail)
    if tail not in ("keep", "trim"):
        raise OpError(f'delay_pack: tail must be "keep", "trim" or a number of rows; got {tail!r}')
    return max_delay if tail == "keep" else 0


def read_segments(segments: Any, num_streams: int) -> Segments:
    """Either form of the segments, checked."""
    # A pair of two-dimensional tensors is a list of two segments.
    is_pair = isinstance(segments, tuple) and len(segments) == 2
    if is_pair and not (isinstance(segments[1], Tensor) and segments[1].dim() == 2):
        flat, offsets = segments
        check_segment("delay_pack: segments[0] (flat)", flat, num_streams)
        host = read_offsets(offsets, "delay_pack: segments[1] (offsets)")
        return Segments(flat, flat.dtype, host, flat.shape[0], None)
    if len(segments) == 0:
        empty = torch.empty(0, num_streams, dtype=torch.int64, device="cpu")
        return Segments(empty, empty.dtype, torch.zeros(1, dtype=torch.int64, device="cpu"), 0, None)
    first, borders, widths = segments[0], [0], []
    for i, segment in enumerate(segments):
        check_segment(f"delay_pack: segments[{i}]", segment, num_streams, narrow=True)
        if segment.dtype != first.dtype or segment.device != first.device:
            raise OpError(
                f"delay_pack: segments[{i}] is {describe(segment)}, but segments[0] is {describe(first)}; "
                "all must have one dtype and device"
            )
        num_frames, width = segment.shape
        borders.append(borders[-1] + num_frames)
        widths.append(width)
    is_narrow = any(width != num_streams for width in widths)
    offsets = torch.tensor(borders, device="cpu")
    return Segments(list(segments), first.dtype, offsets, borders[-1], widths if is_narrow else None)


def read_weight(
    loss_weight: Sequence[Tensor] | Tensor | None, ids: Tensor | list[Tensor]
) -> Tensor | list[Tensor] | None:
    """float32 weights in the form of ``ids``; without weights None beside one tensor, else an empty list."""
    if isinstance(ids, Tensor):
        if loss_weight is None or (not isinstance(loss_weight, Tensor) and len(loss_weight) == 0 == len(ids)):
            return None
        weight = loss_weight if isinstance(loss_weight, Tensor) else torch.cat(list(loss_weight))
        return _float32("delay_pack: loss_weight", weight, tuple(ids.shape), ids.device)
    if loss_weight is None:
        return []
    if isinstance(loss_weight, Tensor):
        lengths, widths = [s.shape[0] for s in ids], {s.shape[1] for s in ids}
        if len(widths) > 1:
            raise OpError(
                "delay_pack: loss_weight must be a list, one tensor per segment, if the segments have different widths"
            )
        shape = (sum(lengths), *widths)
        return list(_float32("delay_pack: loss_weight", loss_weight, shape, ids[0].device).split(lengths))
    if len(loss_weight) != len(ids):
        raise OpError(f"delay_pack: loss_weight has {len(loss_weight)} entries for {len(ids)} segments")
    return [
        _float32(f"delay_pack: loss_weight[{i}]", weight, tuple(segment.shape), segment.device)
        for i, (weight, segment) in enumerate(zip(loss_weight, ids, strict=True))
    ]


def _float32(name: str, weight: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Checked weights in float32; they carry no gradient."""
    if not (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and tuple(weight.shape) == shape
        and weight.device == device
    ):
        raise OpError(f"{name} must be float {list(shape)} on {device}, like the ids; got {describe(weight)}")
    weight = weight.detach() if weight.requires_grad else weight
    return weight if weight.dtype == torch.float32 else weight.to(torch.float32)


def read_per_segment(
    values: Any, name: str, num_segments: int, num_streams: int, dtype: torch.dtype = torch.int64
) -> Tensor | None:
    """``[n, S]`` of ``dtype``; for integers also ``[1, S]``, one row for all segments."""
    if values is None:
        return None
    out = host_tensor(values, dtype)
    if num_segments == 0 and out.numel() == 0:
        return None
    if dtype == torch.int64 and out.shape == (num_streams,):
        return out[None]
    if out.shape != (num_segments, num_streams):
        one_row = f"have {num_streams} values, one per stream, or " if dtype == torch.int64 else ""
        raise OpError(
            f"delay_pack: {name} must {one_row}be [{num_segments}, {num_streams}], a row for each segment; got "
            f"{list(out.shape)}"
        )
    return out


def read_offsets(values: Tensor | Sequence[int], name: str, size: str = "n + 1") -> Tensor:
    """int64 with at least one entry, on the host."""
    out = host_tensor(values, torch.int64)
    if out.dim() != 1 or out.shape[0] < 1:
        raise OpError(f"{name} must be [{size}] offsets; got {describe(out)}")
    return out
