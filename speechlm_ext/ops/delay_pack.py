"""delay_pack: ragged id segments to one packed, delay-interleaved block, in one fused pass; and its inverse.

Stream s of a segment is shifted right by ``delays[s]`` rows, so a model that predicts one row at a time predicts
stream s of a frame after stream 0 of it. The same pass adds id offsets and writes next-row labels, loss weights,
positions and ``cu_seqlens``. No segment sees another.

The list form reads the segments where they lie. The flat form ``(flat, offsets)`` is what `torch.compile` captures
as one graph for any number of segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops._native import LIBRARY, check, describe, int_list, native, stream_handle

_ID_DTYPES = (torch.int32, torch.int64)
_MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class PackedBatch:
    """A packed block: what a multi-stream language model trains on. N rows, S streams, n segments."""

    ids: Tensor
    """``[N, S]`` model input, in the dtype of the segments."""
    labels: Tensor
    """``[N, S]`` ids of the next row of the same segment; pads in each segment's last row."""
    loss_weight: Tensor
    """``[N, S]`` float32 weight of each label; 0 where there is nothing to learn."""
    position: Tensor
    """``[N]`` int32, counts from 0 in each segment."""
    cu_seqlens: Tensor
    """``[n + 1]`` int32 row at which each segment starts, and N at the end."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        moved = (getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self))
        return PackedBatch(*moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; a `torch.utils.data.DataLoader` calls this by itself."""
        return PackedBatch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def delay_pack(
    segments: Sequence[Tensor] | tuple[Tensor, Tensor | Sequence[int]],
    *,
    delays: Sequence[int],
    pad_ids: Sequence[int],
    id_offsets: Sequence[int] | None = None,
    loss_weight: Sequence[Tensor] | Tensor | None = None,
    tail: Literal["keep", "trim"] = "keep",
) -> PackedBatch:
    """Delay-interleave each segment and pack them into one block of rows.

    Row ``t`` of a segment shows ``segment[t - delays[s], s]`` in stream s, or ``pad_ids[s]`` where there is no such
    frame. Delays never cross a segment border. An empty segment is allowed: it becomes ``max(delays)`` rows of pads
    (no row with ``tail="trim"``).

    Args:
        segments: one int32 or int64 ``[T_i, S]`` tensor per segment, all of one dtype and device; or the pair
            ``(flat [ΣT, S], offsets [n + 1])`` where ``offsets`` counts frames and is a list or a CPU tensor (a
            CUDA tensor is copied to the host, which waits for the device). Any strides.
        delays: rows by which each stream is shifted, ``S`` values >= 0; any pattern.
        pad_ids: id that fills each stream's gaps, ``S`` values.
        id_offsets: added to every id of a stream, never to the fill; ``S`` values. Every id that a segment holds
            counts as real, also one that equals the pad. Sums must fit the dtype.
        loss_weight: weight of each id as a label, float ``[T_i, S]`` per segment or flat ``[ΣT, S]``; ``None`` is 1
            for every id of the segments.
        tail: ``"keep"`` gives ``T_i + max(delays)`` rows per segment and loses nothing. ``"trim"`` gives ``T_i``
            rows: the last ``max(delays)`` rows are cut, which loses nothing where a segment ends with as many
            all-pad frames.

    Returns:
        `PackedBatch`; ``ids`` and ``labels`` keep the segments' dtype and device. `delay_unpack` gives back the
        segments (with ``id_offsets`` added).

    Raises:
        OpError: (a ValueError) for a wrong dtype, device, rank or number of streams, offsets that fall or do not end
            at ΣT, a negative delay, a pad id that the dtype cannot hold, or more than 2^31 - 1 rows.

    Example:
        >>> codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> delay_pack([codes], delays=[0, 1, 2], pad_ids=[0, 0, 0]).ids.tolist()
        [[1, 0, 0], [4, 2, 0], [0, 5, 3], [0, 0, 6]]
    """
    delays = int_list(delays, "delay_pack: delays")
    num_streams = len(delays)
    check(num_streams >= 1, "delay_pack: delays must have at least one value")
    check(min(delays) >= 0, f"delay_pack: delays must be 0 or more rows; got {delays}")
    pad_ids = int_list(pad_ids, "delay_pack: pad_ids", num_streams)
    id_offsets = (
        [0] * num_streams
        if id_offsets is None
        else int_list(id_offsets, "delay_pack: id_offsets", num_streams)
    )
    check(tail in ("keep", "trim"), f'delay_pack: tail must be "keep" or "trim"; got {tail!r}')
    shifts = (delays, pad_ids, id_offsets)
    if isinstance(segments, tuple) and len(segments) == 2 and not _is_segment(segments[1]):
        flat, offsets = _flat_form(segments[0], segments[1], num_streams)
        _check_pads(pad_ids, flat.dtype)
        weight = _flat_weight(loss_weight, flat)
        return PackedBatch(*torch.ops.speechlm_ext.delay_pack(flat, offsets, *shifts, weight, tail == "trim"))
    if len(segments) == 0:
        return delay_pack(
            (torch.empty(0, num_streams, dtype=torch.int64), [0]), delays=delays, pad_ids=pad_ids, tail=tail
        )
    parts = _list_form(segments, num_streams)  # type: ignore[arg-type]
    _check_pads(pad_ids, parts[0].dtype)
    weights = _list_weight(loss_weight, parts)
    return PackedBatch(*torch.ops.speechlm_ext.delay_pack_segments(parts, *shifts, weights, tail == "trim"))


def delay_unpack(ids: Tensor, cu_seqlens: Tensor | Sequence[int], *, delays: Sequence[int]) -> list[Tensor]:
    """Undo the delays of a packed block: the exact inverse of `delay_pack`.

    Args:
        ids: int32 or int64 ``[N, S]`` block, e.g. ``PackedBatch.ids`` or generated rows.
        cu_seqlens: ``[n + 1]`` row at which each segment starts, and N at the end. On a GPU it is copied to the
            host, which waits for the device.
        delays: the delays that the block was packed with, ``S`` values.

    Returns:
        One ``[rows_i - max(delays), S]`` tensor per segment (no frames if it has fewer rows): views of one flat
        tensor. For a block packed with ``tail="keep"`` that is every segment as it was, with its id offsets; with
        ``tail="trim"`` the segments without their last ``max(delays)`` frames.

    Raises:
        OpError: (a ValueError) for a wrong dtype, rank, number of streams, or ``cu_seqlens`` that do not start at 0,
            fall, or do not end at N.
    """
    delays = int_list(delays, "delay_unpack: delays")
    _check_ids("delay_unpack: ids", ids, len(delays))
    borders = torch.as_tensor(cu_seqlens).detach().to("cpu", torch.int64)
    check(
        borders.dim() == 1 and len(borders) >= 1,
        f"delay_unpack: cu_seqlens must be [n + 1]; got {describe(cu_seqlens)}",
    )
    check(min(delays) >= 0, f"delay_unpack: delays must be 0 or more rows; got {delays}")
    lengths = (borders.diff() - max(delays)).clamp_(min=0).tolist()
    flat = torch.ops.speechlm_ext.delay_unpack(ids, borders, delays, sum(lengths))
    return list(flat.split(lengths)) if lengths else []


def _is_segment(value: object) -> bool:
    """Tells the list form with two segments, ``(a, b)``, from the flat form ``(flat, offsets)``."""
    return isinstance(value, Tensor) and value.dim() == 2


def _check_ids(name: str, ids: Tensor, num_streams: int) -> None:
    check(isinstance(ids, Tensor), f"{name} must be a tensor; got {describe(ids)}")
    check(
        ids.dtype in _ID_DTYPES and ids.dim() == 2,
        f"{name} must be int32 or int64 [frames, {num_streams}]; got {describe(ids)}",
    )
    check(
        ids.shape[1] == num_streams,
        f"{name} has {ids.shape[1]} streams but delays has {num_streams}; got {describe(ids)}",
    )


def _flat_form(flat: Tensor, offsets: Tensor | Sequence[int], num_streams: int) -> tuple[Tensor, Tensor]:
    _check_ids("delay_pack: segments[0] (flat)", flat, num_streams)
    host = torch.as_tensor(offsets, dtype=torch.int64).to("cpu")
    check(
        host.dim() == 1 and host.shape[0] >= 1,
        f"delay_pack: segments[1] (offsets) must be [n + 1]; got {describe(offsets)}",
    )
    return flat, host


def _check_pads(pad_ids: Sequence[int], dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    for s, pad in enumerate(pad_ids):
        check(limits.min <= pad <= limits.max, f"delay_pack: pad_ids[{s}] = {pad} does not fit {dtype}")


def _list_form(segments: Sequence[Tensor], num_streams: int) -> list[Tensor]:
    for i, segment in enumerate(segments):
        _check_ids(f"delay_pack: segments[{i}]", segment, num_streams)
        check(
            segment.dtype == segments[0].dtype and segment.device == segments[0].device,
            f"delay_pack: segments[{i}] is {describe(segment)}, but segments[0] is {describe(segments[0])}; "
            "all must have one dtype and device",
        )
    return list(segments)


def _list_weight(loss_weight: Sequence[Tensor] | Tensor | None, segments: list[Tensor]) -> list[Tensor]:
    """One float32 weight per segment; none for None."""
    if loss_weight is None:
        return []
    lengths = [segment.shape[0] for segment in segments]
    if isinstance(loss_weight, Tensor):
        flat = loss_weight
        _check_weight(
            "delay_pack: loss_weight", flat, [sum(lengths), segments[0].shape[1]], segments[0].device
        )
        return list(flat.detach().to(torch.float32).split(lengths))
    check(
        len(loss_weight) == len(segments),
        f"delay_pack: loss_weight has {len(loss_weight)} entries for {len(segments)} segments",
    )
    for i, (weight, segment) in enumerate(zip(loss_weight, segments, strict=True)):
        _check_weight(f"delay_pack: loss_weight[{i}]", weight, list(segment.shape), segment.device)
    return [weight.detach().to(torch.float32) for weight in loss_weight]


def _flat_weight(loss_weight: Sequence[Tensor] | Tensor | None, flat: Tensor) -> Tensor | None:
    if loss_weight is None:
        return None
    weight = loss_weight if isinstance(loss_weight, Tensor) else torch.cat(list(loss_weight))
    _check_weight("delay_pack: loss_weight", weight, list(flat.shape), flat.device)
    return weight.detach().to(torch.float32)


def _check_weight(name: str, weight: Tensor, shape: list[int], device: torch.device) -> None:
    check(
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and list(weight.shape) == shape
        and weight.device == device,
        f"{name} must be float {shape} on {device}, like the ids; got {describe(weight)}",
    )


# torch.library registration. `offsets` is a host tensor on every device: the outputs' size comes from shapes alone, so
# a GPU is never waited for.

LIBRARY.define(
    "delay_pack(Tensor flat, Tensor offsets, int[] delays, int[] pad_ids, int[] id_offsets, Tensor? loss_weight, "
    "bool trim) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "delay_pack_segments(Tensor[] segments, int[] delays, int[] pad_ids, int[] id_offsets, Tensor[] loss_weight, "
    "bool trim) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("delay_unpack(Tensor ids, Tensor cu_seqlens, int[] delays, SymInt num_frames) -> Tensor")


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _allocate(like: Tensor, num_frames: int, num_segments: int, tail_rows: int) -> _Outputs:
    num_rows = num_frames + num_segments * tail_rows
    shape = (num_rows, like.shape[1])
    return (
        like.new_empty(shape),
        like.new_empty(shape),
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty((num_rows,), dtype=torch.int32),
        like.new_empty((num_segments + 1,), dtype=torch.int32),
    )


def _check_rows(num_rows: int) -> None:
    check(
        num_rows <= _MAX_ROWS,
        f"delay_pack: the block would have {num_rows} rows, more than cu_seqlens (int32) can hold; "
        "pack fewer segments at a time",
    )


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """The metadata table where the kernel reads it; from page-locked memory, so that nothing waits."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _delay_pack_impl(
    flat: Tensor,
    offsets: Tensor,
    delays: list[int],
    pad_ids: list[int],
    id_offsets: list[int],
    loss_weight: Tensor | None,
    trim: bool,
) -> _Outputs:
    num_segments = offsets.shape[0] - 1
    tail_rows = 0 if trim else max(delays)
    _check_rows(flat.shape[0] + num_segments * tail_rows)
    host_table = torch.cat([offsets, torch.tensor([*delays, *pad_ids, *id_offsets], dtype=torch.int64)])
    outputs = _allocate(flat, flat.shape[0], num_segments, tail_rows)
    native.delay_pack(
        flat.contiguous(),
        None if loss_weight is None else loss_weight.contiguous(),
        host_table,
        _to_device(host_table, flat.device),
        num_segments,
        trim,
        *outputs,
        torch.get_num_threads(),
        stream_handle(flat),
    )
    return outputs


def _delay_pack_segments_cpu(
    segments: list[Tensor],
    delays: list[int],
    pad_ids: list[int],
    id_offsets: list[int],
    loss_weight: list[Tensor],
    trim: bool,
) -> _Outputs:
    """Reads the segments where they lie."""
    offsets = [0, *itertools.accumulate(segment.shape[0] for segment in segments)]
    tail_rows = 0 if trim else max(delays)
    _check_rows(offsets[-1] + len(segments) * tail_rows)
    table = torch.tensor([*offsets, *delays, *pad_ids, *id_offsets], dtype=torch.int64)
    outputs = _allocate(segments[0], offsets[-1], len(segments), tail_rows)
    ids = [segment.contiguous() for segment in segments]
    weights = [weight.contiguous() for weight in loss_weight]
    native.delay_pack_segments(ids, weights, table, trim, *outputs, torch.get_num_threads())
    return outputs


def _delay_pack_segments_cuda(
    segments: list[Tensor],
    delays: list[int],
    pad_ids: list[int],
    id_offsets: list[int],
    loss_weight: list[Tensor],
    trim: bool,
) -> _Outputs:
    """One kernel joins the segments, which is cheaper than sending a table of pointers."""
    offsets = torch.tensor([0, *itertools.accumulate(segment.shape[0] for segment in segments)])
    weight = torch.cat(loss_weight) if loss_weight else None
    return _delay_pack_impl(torch.cat(segments), offsets, delays, pad_ids, id_offsets, weight, trim)


def _delay_unpack_impl(ids: Tensor, cu_seqlens: Tensor, delays: list[int], num_frames: int) -> Tensor:
    num_segments = cu_seqlens.shape[0] - 1
    lengths = (cu_seqlens.diff() - max(delays)).clamp_(min=0)
    zero = cu_seqlens.new_zeros(1)
    host_table = torch.cat([cu_seqlens, zero, lengths.cumsum(0), torch.tensor(delays, dtype=torch.int64)])
    out = ids.new_empty((num_frames, ids.shape[1]))
    table = _to_device(host_table, ids.device)
    native.delay_unpack(
        ids.contiguous(), host_table, table, num_segments, out, torch.get_num_threads(), stream_handle(ids)
    )
    return out


LIBRARY.impl("delay_pack_segments", _delay_pack_segments_cpu, "CPU")
LIBRARY.impl("delay_pack_segments", _delay_pack_segments_cuda, "CUDA")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("delay_pack", _delay_pack_impl, _key)
    LIBRARY.impl("delay_unpack", _delay_unpack_impl, _key)


@torch.library.register_fake("speechlm_ext::delay_pack", lib=LIBRARY)
def _delay_pack_fake(flat, offsets, delays, pad_ids, id_offsets, loss_weight, trim):  # type: ignore[no-untyped-def]
    return _allocate(flat, flat.shape[0], offsets.shape[0] - 1, 0 if trim else max(delays))


@torch.library.register_fake("speechlm_ext::delay_pack_segments", lib=LIBRARY)
def _delay_pack_segments_fake(segments, delays, pad_ids, id_offsets, loss_weight, trim):  # type: ignore[no-untyped-def]
    num_frames = sum(segment.shape[0] for segment in segments)
    return _allocate(segments[0], num_frames, len(segments), 0 if trim else max(delays))


@torch.library.register_fake("speechlm_ext::delay_unpack", lib=LIBRARY)
def _delay_unpack_fake(ids, cu_seqlens, delays, num_frames):  # type: ignore[no-untyped-def]
    return ids.new_empty((num_frames, ids.shape[1]))
