"""torch.library registration of delay_pack and delay_unpack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.dispatch import can_skip_dispatcher
from speechlm_ext.ops.common.native import LIBRARY, OpError, OpIndexError, call_kernel, native, stream_handle
from speechlm_ext.ops.delay_pack.table import Counts, num_rows, offsets_and_limits, segment_shapes

_ARGS = "Tensor table, SymInt[] counts, float fill_weight, ScalarType dtype, bool maps, bool check_ids) -> Tensor[]"
LIBRARY.define(f"delay_pack(Tensor flat, Tensor? loss_weight, {_ARGS}")
LIBRARY.define(f"delay_pack_segments(Tensor[] segments, Tensor[] loss_weight, {_ARGS}")
LIBRARY.define("delay_unpack(Tensor ids, Tensor cu_seqlens, int[] delays, SymInt num_frames) -> Tensor")


class PackArgs(NamedTuple):
    """Arguments of both pack ops besides ids and weights, in the order of their schema."""

    table: Tensor
    """int64 on the host, see `table.make_table`."""
    counts: Sequence[int]
    """See `table.Counts`."""
    fill_weight: float
    dtype: torch.dtype
    maps: bool
    check_ids: bool


def run_pack(
    ids: Tensor | list[Tensor], loss_weight: Tensor | list[Tensor] | None, args: PackArgs
) -> list[Tensor]:
    """Outputs of the op for ids in one tensor, or for a list of segments.

    Without the dispatcher where that would only pass the call on: a fifth of a small call.
    """
    if isinstance(ids, Tensor):
        tensors = (ids,) if loss_weight is None else (ids, loss_weight)
        run = _pack if can_skip_dispatcher(*tensors) else _PACK  # type: ignore[arg-type]
    else:
        run = _pack_segments_cpu if can_skip_dispatcher(*ids, *loss_weight) else _PACK_SEGMENTS  # type: ignore[misc]
    return run(ids, loss_weight, *args)  # type: ignore[no-any-return,arg-type]


def _allocate(like: Tensor, args: PackArgs, counts: Counts) -> list[Tensor]:
    rows, device, int32 = num_rows(counts), like.device, torch.int32
    block = (rows, counts.streams)
    sequences = counts.segments if counts.groups < 0 else counts.groups
    out = [
        torch.empty(block, dtype=args.dtype, device=device),
        torch.empty(block, dtype=args.dtype, device=device),
        torch.empty(block, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=int32, device=device),
        torch.empty(sequences + 1, dtype=int32, device=device),
    ]
    if args.maps:
        out += [torch.empty(rows, dtype=int32, device=device), torch.empty(block, dtype=int32, device=device)]
    return out


def _bad_flag(like: Tensor, args: PackArgs, counts: Counts) -> Tensor | None:
    """int32 flag that the kernel sets for an invalid id; None if ids are not checked."""
    can_fail = counts.limit_rows > 0 or counts.offset_rows > 0 or args.dtype.itemsize < like.dtype.itemsize
    if not can_fail or (like.device.type != "cpu" and not args.check_ids):
        return None
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def _to_device(table: Tensor, device: torch.device) -> Tensor | None:
    """The table in a GPU's memory, copied from page-locked memory without synchronization; None for the CPU.

    Raises:
        OpError: the current stream is capturing.
    """
    if device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        # A replay would copy from page-locked memory that has long been another call's.
        raise OpError(
            "delay_pack and delay_unpack cannot be captured in a CUDA graph: each call copies its table from "
            "the host. Call them before the capture, or in the data loader."
        )
    return table.pin_memory().to(device, non_blocking=True)


def _pack(flat: Tensor, loss_weight: Tensor | None, *arguments: Any) -> list[Tensor]:
    """Pack consecutive segments."""
    args = PackArgs(*arguments)
    counts = Counts(*args.counts)
    out = _allocate(flat, args, counts)
    bad = _bad_flag(flat, args, counts)
    call_kernel(
        native.delay_pack,
        flat.contiguous(),
        None if loss_weight is None else loss_weight.contiguous(),
        args.table,
        _to_device(args.table, flat.device),
        counts,
        args.fill_weight,
        out,
        bad,
        torch.get_num_threads(),
        stream_handle(flat),
    )
    if bad is not None and bool(bad):
        shapes = segment_shapes(args.table, counts)
        parts = flat.reshape(-1).split([frames * width for frames, width in shapes])
        _raise_bad_id([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], args, counts)
    return out


def _pack_segments_cpu(segments: list[Tensor], loss_weight: list[Tensor], *arguments: Any) -> list[Tensor]:
    """Pack segments at their own addresses, without joining them first."""
    args = PackArgs(*arguments)
    counts = Counts(*args.counts)
    _check_segments(segments, loss_weight, args.table, counts)
    ids = [segment.contiguous() for segment in segments]
    weights = [weight.contiguous() for weight in loss_weight]
    out = _allocate(ids[0], args, counts)
    bad = _bad_flag(ids[0], args, counts)
    call_kernel(
        native.delay_pack_segments,
        [t.data_ptr() for t in ids],
        [t.data_ptr() for t in weights],
        ids[0].dtype == torch.int64,
        args.table,
        counts,
        args.fill_weight,
        out,
        bad,
        torch.get_num_threads(),
    )
    if bad is not None and bool(bad):
        _raise_bad_id(segments, args, counts)
    return out


def _pack_segments_cuda(segments: list[Tensor], loss_weight: list[Tensor], *arguments: Any) -> list[Tensor]:
    """Join the segments and pack them: one more kernel, which is cheaper than copying a table of pointers."""
    args = PackArgs(*arguments)
    _check_segments(segments, loss_weight, args.table, Counts(*args.counts))
    flat = torch.cat([segment.reshape(-1, 1) for segment in segments])
    weight = torch.cat([weight.reshape(-1, 1) for weight in loss_weight]) if loss_weight else None
    return _pack(flat, weight, *arguments)


def _check_segments(segments: list[Tensor], loss_weight: list[Tensor], table: Tensor, counts: Counts) -> None:
    """Check that the segments are as the table says: the kernels read raw addresses."""
    n = counts.segments
    if not (len(segments) == n > 0 and len(loss_weight) in (0, n)):
        raise OpError(
            f"delay_pack: {len(segments)} segments and {len(loss_weight)} weights for a table of {n}"
        )
    dtype, shapes = segments[0].dtype, segment_shapes(table, counts)
    for i, (segment, shape) in enumerate(zip(segments, shapes, strict=True)):
        good = segment.shape == shape and segment.dtype == dtype and dtype in (torch.int32, torch.int64)
        if good and loss_weight:
            good = loss_weight[i].shape == shape and loss_weight[i].dtype == torch.float32
        if not good:
            raise OpError(f"delay_pack: segments[{i}] or its weights do not fit the table")


def _raise_bad_id(segments: Sequence[Tensor], args: PackArgs, counts: Counts) -> None:
    """Find the first invalid id and raise `OpIndexError` with its segment, frame and stream."""
    fits = torch.iinfo(args.dtype)
    offsets, limits = offsets_and_limits(args.table, counts)
    for i, segment in enumerate(segments):
        ids, width = segment.cpu().to(torch.int64), segment.shape[1]
        sums, bad, wrapped = ids, torch.zeros_like(ids, dtype=torch.bool), None
        shift = torch.zeros(width, dtype=torch.int64, device="cpu")
        if counts.offset_rows:
            shift = offsets[i if counts.offset_rows > 1 else 0, :width]
            sums = ids + shift
            wrapped = ((ids ^ sums) & (shift ^ sums)) < 0
        if counts.limit_rows:
            limit = limits[i if counts.limit_rows > 1 else 0, :width]
            bad = (ids < 0) | (ids >= limit)
        outside = bad.clone()
        bad |= (sums < fits.min) | (sums > fits.max)
        bad = bad if wrapped is None else bad | wrapped
        if not bad.any():
            continue
        t, s = (int(v) for v in bad.nonzero()[0])
        where = f"delay_pack: segments[{i}][{t}, {s}] (frame {t}, stream {s}) is {int(ids[t, s])}"
        if outside[t, s]:
            raise OpIndexError(f"{where}; ids of this stream must be in [0, {int(limit[s])})")
        raise OpIndexError(
            f"{where}, with its offset {int(ids[t, s]) + int(shift[s])}, which {args.dtype} cannot hold"
        )
    raise OpIndexError(f"delay_pack: an id is outside its range or cannot be held by {args.dtype}")


def _unpack(ids: Tensor, cu_seqlens: Tensor, delays: list[int], num_frames: int) -> Tensor:
    num_segments = cu_seqlens.shape[0] - 1
    lengths = (cu_seqlens.diff() - max(delays)).clamp_(min=0)
    zero = cu_seqlens.new_zeros(1)
    host_table = torch.cat(
        [cu_seqlens, zero, lengths.cumsum(0), torch.tensor(delays, dtype=torch.int64, device="cpu")]
    )
    out = ids.new_empty((num_frames, ids.shape[1]))
    table = _to_device(host_table, ids.device)
    call_kernel(
        native.delay_unpack,
        ids.contiguous(),
        host_table,
        host_table if table is None else table,
        num_segments,
        out,
        torch.get_num_threads(),
        stream_handle(ids),
    )
    return out


_PACK = torch.ops.speechlm_ext.delay_pack.default
_PACK_SEGMENTS = torch.ops.speechlm_ext.delay_pack_segments.default

LIBRARY.impl("delay_pack_segments", _pack_segments_cpu, "CPU")
LIBRARY.impl("delay_pack_segments", _pack_segments_cuda, "CUDA")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("delay_pack", _pack, _key)
    LIBRARY.impl("delay_unpack", _unpack, _key)


@torch.library.register_fake("speechlm_ext::delay_pack", lib=LIBRARY)
def _pack_fake(flat: Tensor, loss_weight: Tensor | None, *arguments: Any) -> list[Tensor]:
    args = PackArgs(*arguments)
    return _allocate(flat, args, Counts(*args.counts))


@torch.library.register_fake("speechlm_ext::delay_pack_segments", lib=LIBRARY)
def _pack_segments_fake(segments: list[Tensor], loss_weight: list[Tensor], *arguments: Any) -> list[Tensor]:
    return _pack_fake(segments[0], None, *arguments)


@torch.library.register_fake("speechlm_ext::delay_unpack", lib=LIBRARY)
def _unpack_fake(ids: Tensor, cu_seqlens: Tensor, delays: list[int], num_frames: int) -> Tensor:
    return ids.new_empty((num_frames, ids.shape[1]))
