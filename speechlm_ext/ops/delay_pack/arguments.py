"""The arguments of `delay_pack`, checked, in the one form that the op takes: tensors on the host, and plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.ops.common.native import check, describe, int_list
from speechlm_ext.ops.delay_pack.op import Counts, eager

ID_DTYPES = (torch.int32, torch.int64)
MOST_STREAMS = 64
_MOST_ROWS = 2**31 - 1
_LIMITS = {dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in ID_DTYPES}

#: S values, or ``[n, S]``.
PerSegment: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
#: Ids for every segment the same, one list per segment, or ``(ids, offsets)``.
Specials: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | tuple[Tensor, Tensor] | Tensor
SpecialWeight: TypeAlias = float | Sequence[float] | Tensor


def shifts(
    delays: Sequence[int], pad_ids: Sequence[int], tail_ids: Sequence[int] | None
) -> tuple[list[int], list[int], list[int]]:
    """Delays, pad ids and tail ids as lists; the latter two are one list where they are the same."""
    delays = int_list(delays, "delay_pack: delays")
    S = len(delays)
    if not 1 <= S <= MOST_STREAMS:
        check(S >= 1, "delay_pack: delays must have at least one value")
        check(False, f"delay_pack: there must be 1 to {MOST_STREAMS} streams; got {S}")
    if min(delays) < 0:
        check(False, f"delay_pack: delays must be 0 or more rows; got {delays}")
    pad_ids = int_list(pad_ids, "delay_pack: pad_ids", S)
    return delays, pad_ids, pad_ids if tail_ids is None else int_list(tail_ids, "delay_pack: tail_ids", S)


def tail_rows(tail: str | int, max_delay: int) -> int:
    """How many rows follow a segment's last frame."""
    if isinstance(tail, (int, np.integer)) and not isinstance(tail, bool):
        check(
            0 <= tail <= max_delay,
            f"delay_pack: tail must be 0 to {max_delay} rows, the largest delay; got {tail}",
        )
        return int(tail)
    if tail not in ("keep", "trim"):
        check(False, f'delay_pack: tail must be "keep", "trim" or a number of rows; got {tail!r}')
    return max_delay if tail == "keep" else 0


def is_segment(value: object) -> bool:
    """Tells the list form with two segments, ``(a, b)``, from the flat form ``(flat, offsets)``."""
    return isinstance(value, Tensor) and value.dim() == 2


def check_segment(name: str, ids: Tensor, num_streams: int, narrow: bool = False) -> None:
    """``ids`` is int ``[frames, S]``; with ``narrow`` it may have fewer columns, but one."""
    if not isinstance(ids, Tensor):
        check(False, f"{name} must be a tensor; got {describe(ids)}")
    if ids.dtype not in ID_DTYPES or ids.dim() != 2:
        check(False, f"{name} must be int32 or int64 [frames, {num_streams}]; got {describe(ids)}")
    streams = ids.shape[1]
    if streams != num_streams and not (narrow and 1 <= streams < num_streams):
        check(False, f"{name} has {streams} streams but delays has {num_streams}; got {describe(ids)}")


def flat_form(flat: Tensor, offsets: Tensor | Sequence[int], num_streams: int) -> tuple[Tensor, Tensor]:
    check_segment("delay_pack: segments[0] (flat)", flat, num_streams)
    host = host_tensor(offsets, torch.int64)
    if host.dim() != 1 or host.shape[0] < 1:
        check(False, f"delay_pack: segments[1] (offsets) must be [n + 1]; got {describe(offsets)}")
    return flat, host


def list_form(segments: Sequence[Tensor], num_streams: int) -> list[Tensor]:
    for i, segment in enumerate(segments):
        check_segment(f"delay_pack: segments[{i}]", segment, num_streams, narrow=True)
        if segment.dtype != segments[0].dtype or segment.device != segments[0].device:
            check(
                False,
                f"delay_pack: segments[{i}] is {describe(segment)}, but segments[0] is {describe(segments[0])}; "
                "all must have one dtype and device",
            )
    return list(segments)


def list_weight(loss_weight: Sequence[Tensor] | Tensor | None, segments: list[Tensor]) -> list[Tensor]:
    """One float32 weight per segment; none for None."""
    if loss_weight is None:
        return []
    if isinstance(loss_weight, Tensor):
        lengths, widths = [s.shape[0] for s in segments], {s.shape[1] for s in segments}
        check(
            len(widths) == 1,
            "delay_pack: loss_weight must be a list, one tensor per segment, where the segments have different widths",
        )
        _check_weight("delay_pack: loss_weight", loss_weight, (sum(lengths), *widths), segments[0].device)
        return list(_float32(loss_weight).split(lengths))
    check(
        len(loss_weight) == len(segments),
        f"delay_pack: loss_weight has {len(loss_weight)} entries for {len(segments)} segments",
    )
    for i, (weight, segment) in enumerate(zip(loss_weight, segments, strict=True)):
        _check_weight(f"delay_pack: loss_weight[{i}]", weight, tuple(segment.shape), segment.device)
    return [_float32(weight) for weight in loss_weight]


def flat_weight(loss_weight: Sequence[Tensor] | Tensor | None, flat: Tensor) -> Tensor | None:
    if loss_weight is None or (not isinstance(loss_weight, Tensor) and len(loss_weight) == 0 == len(flat)):
        return None
    weight = loss_weight if isinstance(loss_weight, Tensor) else torch.cat(list(loss_weight))
    _check_weight("delay_pack: loss_weight", weight, tuple(flat.shape), flat.device)
    return _float32(weight)


def _float32(weight: Tensor) -> Tensor:
    """Weights carry no gradient."""
    weight = weight.detach() if weight.requires_grad else weight
    return weight if weight.dtype == torch.float32 else weight.to(torch.float32)


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and tuple(weight.shape) == shape
        and weight.device == device
    ):
        check(False, f"{name} must be float {list(shape)} on {device}, like the ids; got {describe(weight)}")


def check_fits(ids: Sequence[int] | Tensor, name: str, dtype: torch.dtype) -> None:
    low, high = _LIMITS[dtype]
    if isinstance(ids, Tensor):
        if torch.compiler.is_compiling() or ids.numel() == 0 or dtype == torch.int64:
            return
        smallest, largest = (int(v) for v in ids.aminmax())
        check(
            smallest >= low and largest <= high,
            f"delay_pack: ids of {name} from {smallest} to {largest} do not fit {dtype}",
        )
        return
    for s, value in enumerate(ids):
        if not low <= value <= high:
            check(False, f"delay_pack: {name}[{s}] = {value} does not fit {dtype}")


def per_segment(values: PerSegment | None, name: str, num_segments: int, num_streams: int) -> Tensor | None:
    """int64 ``[1, S]`` or ``[n, S]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.int64)
    if num_segments == 0 and out.numel() == 0:
        return None
    check(
        out.shape == (num_streams,) or out.shape == (num_segments, num_streams),
        f"delay_pack: {name} must have {num_streams} values, one per stream, or be [{num_segments}, {num_streams}], a "
        f"row for each segment; got {list(out.shape)}",
    )
    return out[None] if out.dim() == 1 else out


def factors(
    values: Tensor | Sequence[Sequence[float]] | None, num_segments: int, num_streams: int
) -> Tensor | None:
    """float64 ``[n, S]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.float64)
    if num_segments == 0 and out.numel() == 0:
        return None
    check(
        out.shape == (num_segments, num_streams),
        f"delay_pack: segment_weight must be [{num_segments}, {num_streams}], a row for each segment; got "
        f"{list(out.shape)}",
    )
    return out


def make_table(
    offsets: Tensor,
    num_frames: int,
    widths: Sequence[int] | None,
    shifts: tuple[list[int], list[int], list[int]],
    tail: int,
    special: list[Tensor],
    group_offsets: Tensor | None,
    id_offsets: Tensor | None,
    num_ids: Tensor | None,
    segment_weight: Tensor | None,
) -> tuple[Tensor, Counts]:
    """One int64 host tensor with everything that the kernels need to know, its columns in the order of DelayPackMeta
    (csrc/delay_pack/delay_pack.h), and the counts that say which columns there are.

    Args:
        widths: streams that each segment fills; None: all.
        shifts: delays, pad ids and tail ids.
        special: see `specials`.
    """
    n, S = offsets.shape[0] - 1, len(shifts[0])
    make = _cached_shift_column if eager(offsets) else _shift_column
    columns = [offsets, make(*(tuple(values) for values in shifts))]
    num_specials = special[0].shape[0] if special else 0
    if num_specials:
        columns += [special[1], special[2], special[0], special[3].view(torch.int64)]
    if widths is not None:
        width = torch.tensor(widths, dtype=torch.int64, device="cpu")
        size = offsets.diff() * width
        columns += [width, size.cumsum(0) - size]
    if group_offsets is not None:
        lengths = group_offsets.diff()
        if not torch.compiler.is_compiling():  # there the kernels' own check must do
            check(
                int(group_offsets[-1]) == n and int(group_offsets[0]) == 0 and not bool((lengths < 0).any()),
                f"delay_pack: groups must rise from 0 to {n}, the number of segments; got {group_offsets.tolist()}",
            )
        ends = (group_offsets[:-1], group_offsets[1:])
        columns += [group_offsets, *(end.repeat_interleave(lengths, output_size=n) for end in ends)]
    columns += [t.flatten() for t in (id_offsets, num_ids) if t is not None]
    if segment_weight is not None:
        columns.append(segment_weight.contiguous().view(torch.int64).flatten())
    offset_rows, limit_rows, weight_rows = (
        0 if t is None else t.shape[0] for t in (id_offsets, num_ids, segment_weight)
    )
    num_groups = -1 if group_offsets is None else group_offsets.shape[0] - 1
    counts = Counts(
        *(n, num_groups, S, num_frames, num_specials, int(widths is not None)),
        *(offset_rows, limit_rows, weight_rows, tail),
    )
    if counts.rows > _MOST_ROWS:
        check(
            False,
            f"delay_pack: the block would have {counts.rows} rows, more than cu_seqlens (int32) can hold; "
            "pack fewer segments at a time",
        )
    return torch.cat(columns), counts


def _shift_column(delays: tuple[int, ...], pad_ids: tuple[int, ...], tail_ids: tuple[int, ...]) -> Tensor:
    return torch.tensor([*delays, *pad_ids, *tail_ids], dtype=torch.int64, device="cpu")


#: A program has one or two sets of delays and fills, and making the tensor is a sixth of a small call.
_cached_shift_column = lru_cache(maxsize=16)(_shift_column)


def host_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """``values`` as a tensor on the host."""
    if type(values) is Tensor and values.dtype == dtype and values.device.type == "cpu":
        return values
    out = values.detach().to("cpu") if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    if dtype == torch.int64 and out.is_floating_point() and out.numel():
        check(False, f"delay_pack: whole numbers are needed; got {describe(out)}")
    return out.to(dtype)


def groups(values: Tensor | Sequence[int] | None, num_segments: int) -> Tensor | None:
    """int64 ``[g + 1]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.int64)
    check(
        out.dim() == 1 and out.shape[0] >= 1,
        f"delay_pack: groups must be [g + 1] offsets over the {num_segments} segments; got {list(out.shape)}",
    )
    return out
