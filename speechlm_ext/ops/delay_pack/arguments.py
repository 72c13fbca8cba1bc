"""The arguments of `delay_pack`, checked and converted to those of its op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe, int_list
from speechlm_ext.ops.delay_pack.checks import (
    ID_DTYPES,
    MAX_STREAMS,
    PerSegment,
    Specials,
    SpecialWeight,
    check_fits,
    check_segment,
    host_tensor,
)
from speechlm_ext.ops.delay_pack.op import PackArgs
from speechlm_ext.ops.delay_pack.special_ids import specials
from speechlm_ext.ops.delay_pack.table import Columns, make_table


class _Segments(NamedTuple):
    """The segments of either form."""

    ids: Tensor | list[Tensor]
    """One tensor ``[ΣT, S]`` of consecutive segments, or one ``[T_i, C_i]`` per segment."""
    dtype: torch.dtype
    offsets: Tensor
    """int64 ``[n + 1]`` on the host: frame at which each segment starts."""
    num_frames: int
    widths: list[int] | None
    """Streams of each segment; None: all have S."""


def read_arguments(
    segments: Sequence[Tensor] | tuple[Tensor, Tensor | Sequence[int]],
    *,
    delays: Sequence[int],
    pad_ids: Sequence[int],
    id_offsets: PerSegment | None,
    loss_weight: Sequence[Tensor] | Tensor | None,
    tail: Literal["keep", "trim"] | int,
    segment_weight: Tensor | Sequence[Sequence[float]] | None,
    prefix: Specials | None,
    suffix: Specials | None,
    prefix_weight: SpecialWeight,
    suffix_weight: SpecialWeight,
    groups: Tensor | Sequence[int] | None,
    tail_ids: Sequence[int] | None,
    fill_weight: float,
    num_ids: PerSegment | None,
    dtype: torch.dtype | None,
    maps: bool,
    check_ids: bool,
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor] | None, PackArgs]:
    """Ids, weights and the other arguments of the op; see `speechlm_ext.ops.delay_pack` for each.

    Ids and weights are one tensor each (no weights: None), or one list each (no weights: an empty one).
    """
    shifts = _shifts(delays, pad_ids, tail_ids)
    S = len(shifts[0])
    given = _read_segments(segments, S)
    n = given.offsets.shape[0] - 1
    dtype = given.dtype if dtype is None else dtype
    if dtype not in ID_DTYPES:
        raise OpError(f"delay_pack: dtype must be int32 or int64; got {dtype}")
    check_fits(shifts[1], "pad_ids", dtype)
    if tail_ids is not None:
        check_fits(shifts[2], "tail_ids", dtype)
    columns = Columns(
        offsets=given.offsets,
        shifts=shifts,
        widths=given.widths,
        specials=specials(prefix, suffix, prefix_weight, suffix_weight, n, dtype),
        groups=_groups(groups, n),
        id_offsets=_per_segment(id_offsets, "id_offsets", n, S),
        num_ids=_per_segment(num_ids, "num_ids", n, S),
        segment_weight=_segment_weight(segment_weight, n, S),
    )
    table, counts = make_table(columns, given.num_frames, _tail_rows(tail, max(shifts[0])))
    weight = _list_weight if isinstance(given.ids, list) else _flat_weight
    args = PackArgs(table, counts, float(fill_weight), dtype, bool(maps), bool(check_ids))
    return given.ids, weight(loss_weight, given.ids), args  # type: ignore[arg-type]


def _shifts(
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


def _tail_rows(tail: str | int, max_delay: int) -> int:
    """Rows after a segment's last frame."""
    if isinstance(tail, (int, np.integer)) and not isinstance(tail, bool):
        if not 0 <= tail <= max_delay:
            raise OpError(f"delay_pack: tail must be 0 to {max_delay} rows, the largest delay; got {tail}")
        return int(tail)
    if tail not in ("keep", "trim"):
        raise OpError(f'delay_pack: tail must be "keep", "trim" or a number of rows; got {tail!r}')
    return max_delay if tail == "keep" else 0


def _read_segments(segments: Any, num_streams: int) -> _Segments:
    # A pair of two-dimensional tensors is a list of two segments.
    is_pair = isinstance(segments, tuple) and len(segments) == 2
    if is_pair and not (isinstance(segments[1], Tensor) and segments[1].dim() == 2):
        flat, offsets = segments
        check_segment("delay_pack: segments[0] (flat)", flat, num_streams)
        host = host_tensor(offsets, torch.int64)
        if host.dim() != 1 or host.shape[0] < 1:
            raise OpError(f"delay_pack: segments[1] (offsets) must be [n + 1]; got {describe(offsets)}")
        return _Segments(flat, flat.dtype, host, flat.shape[0], None)
    if len(segments) == 0:
        empty = torch.empty(0, num_streams, dtype=torch.int64, device="cpu")
        return _Segments(empty, empty.dtype, torch.zeros(1, dtype=torch.int64, device="cpu"), 0, None)
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
    return _Segments(list(segments), first.dtype, offsets, borders[-1], widths if is_narrow else None)


def _list_weight(loss_weight: Sequence[Tensor] | Tensor | None, segments: list[Tensor]) -> list[Tensor]:
    """One float32 weight per segment; an empty list for None."""
    if loss_weight is None:
        return []
    if isinstance(loss_weight, Tensor):
        lengths, widths = [s.shape[0] for s in segments], {s.shape[1] for s in segments}
        if len(widths) > 1:
            raise OpError(
                "delay_pack: loss_weight must be a list, one tensor per segment, if the segments have different widths"
            )
        _check_weight("delay_pack: loss_weight", loss_weight, (sum(lengths), *widths), segments[0].device)
        return list(_float32(loss_weight).split(lengths))
    if len(loss_weight) != len(segments):
        raise OpError(f"delay_pack: loss_weight has {len(loss_weight)} entries for {len(segments)} segments")
    for i, (weight, segment) in enumerate(zip(loss_weight, segments, strict=True)):
        _check_weight(f"delay_pack: loss_weight[{i}]", weight, tuple(segment.shape), segment.device)
    return [_float32(weight) for weight in loss_weight]


def _flat_weight(loss_weight: Sequence[Tensor] | Tensor | None, flat: Tensor) -> Tensor | None:
    """float32 ``[ΣT, S]``, or None."""
    if loss_weight is None or (not isinstance(loss_weight, Tensor) and len(loss_weight) == 0 == len(flat)):
        return None
    weight = loss_weight if isinstance(loss_weight, Tensor) else torch.cat(list(loss_weight))
    _check_weight("delay_pack: loss_weight", weight, tuple(flat.shape), flat.device)
    return _float32(weight)


def _float32(weight: Tensor) -> Tensor:
    """The weights in float32; they carry no gradient."""
    weight = weight.detach() if weight.requires_grad else weight
    return weight if weight.dtype == torch.float32 else weight.to(torch.float32)


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and tuple(weight.shape) == shape
        and weight.device == device
    ):
        raise OpError(f"{name} must be float {list(shape)} on {device}, like the ids; got {describe(weight)}")


def _per_segment(values: PerSegment | None, name: str, num_segments: int, num_streams: int) -> Tensor | None:
    """int64 ``[1, S]`` or ``[n, S]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.int64)
    if num_segments == 0 and out.numel() == 0:
        return None
    if out.shape not in ((num_streams,), (num_segments, num_streams)):
        raise OpError(
            f"delay_pack: {name} must have {num_streams} values, one per stream, or be "
            f"[{num_segments}, {num_streams}], a row for each segment; got {list(out.shape)}"
        )
    return out[None] if out.dim() == 1 else out


def _segment_weight(
    values: Tensor | Sequence[Sequence[float]] | None, num_segments: int, num_streams: int
) -> Tensor | None:
    """float64 ``[n, S]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.float64)
    if num_segments == 0 and out.numel() == 0:
        return None
    if out.shape != (num_segments, num_streams):
        raise OpError(
            f"delay_pack: segment_weight must be [{num_segments}, {num_streams}], a row for each segment; got "
            f"{list(out.shape)}"
        )
    return out


def _groups(values: Tensor | Sequence[int] | None, num_segments: int) -> Tensor | None:
    """int64 ``[g + 1]``."""
    if values is None:
        return None
    out = host_tensor(values, torch.int64)
    if out.dim() != 1 or out.shape[0] < 1:
        raise OpError(
            f"delay_pack: groups must be [g + 1] offsets over the {num_segments} segments; got {list(out.shape)}"
        )
    return out
