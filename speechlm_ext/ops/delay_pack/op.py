"""torch.library registration of delay_pack and delay_unpack.

What describes a block is one host table on every device (`_delay_pack_args.make_table`), and the outputs' sizes follow
from its counts alone, so a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from speechlm_ext.ops.common.native import LIBRARY, OpError, OpIndexError, check, native, stream_handle

_RULE = "Tensor table, SymInt[] counts, float fill_weight, ScalarType dtype, bool maps, bool check_ids) -> Tensor[]"
LIBRARY.define(f"delay_pack(Tensor flat, Tensor? loss_weight, {_RULE}")
LIBRARY.define(f"delay_pack_segments(Tensor[] segments, Tensor[] loss_weight, {_RULE}")
LIBRARY.define("delay_unpack(Tensor ids, Tensor cu_seqlens, int[] delays, SymInt num_frames) -> Tensor")


class Counts(NamedTuple):
    """What is in the table, in the order that the kernels read it (DelayPackShape)."""

    segments: int
    groups: int
    """-1: none given, every segment is a sequence."""
    streams: int
    frames: int
    specials: int
    has_widths: int
    offset_rows: int
    limit_rows: int
    weight_rows: int
    tail: int

    @property
    def rows(self) -> int:
        return self.frames + self.specials + self.segments * self.tail


def _allocate(like: Tensor, given: Sequence[int], dtype: torch.dtype, maps: bool) -> list[Tensor]:
    counts = Counts(*given)
    block = (counts.rows, counts.streams)
    sequences = counts.segments if counts.groups < 0 else counts.groups
    rows, device, int32 = block[0], like.device, torch.int32
    out = [
        torch.empty(block, dtype=dtype, device=device),
        torch.empty(block, dtype=dtype, device=device),
        torch.empty(block, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=int32, device=device),
        torch.empty(sequences + 1, dtype=int32, device=device),
    ]
    if maps:
        out += [torch.empty(rows, dtype=int32, device=device), torch.empty(block, dtype=int32, device=device)]
    return out


def _bad_flag(like: Tensor, counts: Sequence[int], dtype: torch.dtype, check_ids: bool) -> Tensor | None:
    """Where the kernel says that an id may not be; None where nobody looks."""
    given = Counts(*counts)
    wanted = given.limit_rows > 0 or given.offset_rows > 0 or dtype.itemsize < like.dtype.itemsize
    if not wanted or (like.device.type != "cpu" and not check_ids):
        return None
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def _checked(run: Any, *arguments: Any) -> None:
    """Call a kernel; what it refuses is an error of this op."""
    try:
        run(*arguments)
    except ValueError as error:
        raise OpError(str(error)) from None


def _to_device(table: Tensor, device: torch.device) -> Tensor | None:
    """The metadata table where a GPU reads it; from page-locked memory, so that nothing waits."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else None


def _delay_pack_impl(
    flat: Tensor,
    loss_weight: Tensor | None,
    table: Tensor,
    counts: list[int],
    fill_weight: float,
    dtype: torch.dtype,
    maps: bool,
    check_ids: bool,
) -> list[Tensor]:
    out = _run(flat, loss_weight, table, counts, fill_weight, dtype, maps, check_ids)
    if out is None:
        offsets = table[: counts[0] + 1]
        _raise_bad_id(flat.split(offsets.diff().tolist()), table, counts, dtype)
    return out  # type: ignore[return-value]


def _run(
    ids: Tensor,
    weight: Tensor | None,
    table: Tensor,
    counts: list[int],
    fill_weight: float,
    dtype: torch.dtype,
    maps: bool,
    check_ids: bool,
) -> list[Tensor] | None:
    """Pack ids that lie one after the other. None for an id among them that may not be."""
    out = _allocate(ids, counts, dtype, maps)
    bad = _bad_flag(ids, counts, dtype, check_ids)
    _checked(
        native.delay_pack,
        ids.contiguous(),
        None if weight is None else weight.contiguous(),
        table,
        _to_device(table, ids.device),
        counts,
        fill_weight,
        out,
        bad,
        torch.get_num_threads(),
        stream_handle(ids),
    )
    return None if bad is not None and bool(bad) else out


def _delay_pack_segments_cpu(
    segments: list[Tensor],
    loss_weight: list[Tensor],
    table: Tensor,
    counts: list[int],
    fill_weight: float,
    dtype: torch.dtype,
    maps: bool,
    check_ids: bool,
) -> list[Tensor]:
    """Reads the segments where they lie."""
    _check_segments(segments, loss_weight, table, counts)
    ids = [segment.contiguous() for segment in segments]
    weights = [weight.contiguous() for weight in loss_weight]
    out = _allocate(ids[0], counts, dtype, maps)
    bad = _bad_flag(ids[0], counts, dtype, check_ids)
    _checked(
        native.delay_pack_segments,
        [t.data_ptr() for t in ids],
        [t.data_ptr() for t in weights],
        ids[0].dtype == torch.int64,
        table,
        counts,
        fill_weight,
        out,
        bad,
        torch.get_num_threads(),
    )
    if bad is not None and bool(bad):
        _raise_bad_id(segments, table, counts, dtype)
    return out


def _delay_pack_segments_cuda(
    segments: list[Tensor],
    loss_weight: list[Tensor],
    table: Tensor,
    counts: list[int],
    fill_weight: float,
    dtype: torch.dtype,
    maps: bool,
    check_ids: bool,
) -> list[Tensor]:
    """One kernel joins the segments, which is cheaper than sending a table of pointers."""
    _check_segments(segments, loss_weight, table, counts)
    ids = torch.cat([segment.reshape(-1, 1) for segment in segments])
    weight = torch.cat([weight.reshape(-1, 1) for weight in loss_weight]) if loss_weight else None
    out = _run(ids, weight, table, counts, fill_weight, dtype, maps, check_ids)
    if out is None:
        _raise_bad_id(segments, table, counts, dtype)
    return out  # type: ignore[return-value]


def _check_segments(
    segments: list[Tensor], loss_weight: list[Tensor], table: Tensor, given: list[int]
) -> None:
    """The kernels read addresses: what the table says of them must be so."""
    counts = Counts(*given)
    n = counts.segments
    check(
        len(segments) == n > 0 and len(loss_weight) in (0, n),
        f"delay_pack: {len(segments)} segments and {len(loss_weight)} weights for a table of {n}",
    )
    offsets = table[: n + 1].tolist()
    first = len(table) - _size_from_widths(counts)
    widths = table[first : first + n].tolist() if counts.has_widths else [counts.streams] * n
    for i, segment in enumerate(segments):
        if (
            segment.shape != (offsets[i + 1] - offsets[i], widths[i])
            or segment.dtype != segments[0].dtype
            or segment.dtype not in (torch.int32, torch.int64)
            or (
                loss_weight
                and (loss_weight[i].shape != segment.shape or loss_weight[i].dtype != torch.float32)
            )
        ):
            check(False, f"delay_pack: segments[{i}] or its weights do not fit the table")


def _size_from_widths(counts: Counts) -> int:
    """Entries of the table from the widths to its end."""
    n, S = counts.segments, counts.streams
    groups = counts.groups + 1 + 2 * n if counts.groups >= 0 else 0
    widths = 2 * n if counts.has_widths else 0
    return widths + groups + (counts.offset_rows + counts.limit_rows + counts.weight_rows) * S


def _raise_bad_id(segments: Sequence[Tensor], table: Tensor, given: list[int], dtype: torch.dtype) -> None:
    """Find the first id that may not be, and name it."""
    counts = Counts(*given)
    S, fits = counts.streams, torch.iinfo(dtype)
    end = len(table) - counts.weight_rows * S
    limits = table[end - counts.limit_rows * S : end].view(-1, S)
    end -= counts.limit_rows * S
    offsets = table[end - counts.offset_rows * S : end].view(-1, S)
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
            f"{where}, with its offset {int(ids[t, s]) + int(shift[s])}, which {dtype} cannot hold"
        )
    raise OpIndexError(f"delay_pack: an id is outside its range or cannot be held by {dtype}")


def _delay_unpack_impl(ids: Tensor, cu_seqlens: Tensor, delays: list[int], num_frames: int) -> Tensor:
    num_segments = cu_seqlens.shape[0] - 1
    lengths = (cu_seqlens.diff() - max(delays)).clamp_(min=0)
    zero = cu_seqlens.new_zeros(1)
    host_table = torch.cat(
        [cu_seqlens, zero, lengths.cumsum(0), torch.tensor(delays, dtype=torch.int64, device="cpu")]
    )
    out = ids.new_empty((num_frames, ids.shape[1]))
    table = _to_device(host_table, ids.device)
    _checked(
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


def eager(*tensors: Tensor) -> bool:
    """Whether nothing but the kernel would see a call of the op: plain tensors of the CPU, and nobody who traces."""
    if torch.compiler.is_compiling():
        return False
    return (
        all(type(t) is Tensor and t.device.type == "cpu" and not t.is_neg() for t in tensors)
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def delay_pack_op(*arguments: Any) -> list[Tensor]:
    """The op, without the dispatcher where that would only pass it on: a fifth of a small call."""
    tensors = arguments[:1] if arguments[1] is None else arguments[:2]
    return _EAGER["delay_pack"](*arguments) if eager(*tensors) else _PACK(*arguments)


def delay_pack_segments_op(*arguments: Any) -> list[Tensor]:
    """As `delay_pack_op`, for a list of segments."""
    if eager(*arguments[0], *arguments[1]):
        return _EAGER["delay_pack_segments"](*arguments)
    return _PACK_SEGMENTS(*arguments)


_EAGER = {"delay_pack": _delay_pack_impl, "delay_pack_segments": _delay_pack_segments_cpu}
_PACK = torch.ops.speechlm_ext.delay_pack.default
_PACK_SEGMENTS = torch.ops.speechlm_ext.delay_pack_segments.default

LIBRARY.impl("delay_pack_segments", _delay_pack_segments_cpu, "CPU")
LIBRARY.impl("delay_pack_segments", _delay_pack_segments_cuda, "CUDA")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("delay_pack", _delay_pack_impl, _key)
    LIBRARY.impl("delay_unpack", _delay_unpack_impl, _key)


@torch.library.register_fake("speechlm_ext::delay_pack", lib=LIBRARY)
def _delay_pack_fake(flat, loss_weight, table, counts, fill_weight, dtype, maps, check_ids):  # type: ignore[no-untyped-def]
    return _allocate(flat, counts, dtype, maps)


@torch.library.register_fake("speechlm_ext::delay_pack_segments", lib=LIBRARY)
def _delay_pack_segments_fake(segments, loss_weight, table, counts, fill_weight, dtype, maps, check_ids):  # type: ignore[no-untyped-def]
    return _allocate(segments[0], counts, dtype, maps)


@torch.library.register_fake("speechlm_ext::delay_unpack", lib=LIBRARY)
def _delay_unpack_fake(ids, cu_seqlens, delays, num_frames):  # type: ignore[no-untyped-def]
    return ids.new_empty((num_frames, ids.shape[1]))
