"""delay_pack: ragged id segments to one packed, delay-interleaved block, in one fused pass; and its inverse.

Stream s of a segment is shifted right by ``delays[s]`` rows, so a model that predicts one row at a time predicts
stream s of a frame after stream 0 of it. The same pass adds id offsets, writes special ids around each segment, and
next-row labels, loss weights, positions and ``cu_seqlens``. No sequence sees another.

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

from speechlm_ext.ops.common.native import check, describe, int_list
from speechlm_ext.ops.delay_pack import arguments as args
from speechlm_ext.ops.delay_pack.op import delay_pack_op, delay_pack_segments_op
from speechlm_ext.ops.delay_pack.special_ids import specials


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A packed block: what a multi-stream language model trains on. N rows, S streams, n sequences."""

    ids: Tensor
    """``[N, S]`` model input, int32 or int64."""
    labels: Tensor
    """``[N, S]`` ids of the next row of the same sequence; fills in each sequence's last row."""
    loss_weight: Tensor
    """``[N, S]`` float32 weight of each label; 0 where there is nothing to learn."""
    position: Tensor
    """``[N]`` int32, counts from 0 in each sequence."""
    cu_seqlens: Tensor
    """``[n + 1]`` int32 row at which each sequence starts, and N at the end."""
    segment_map: Tensor | None = None
    """``[N]`` int32 number of the segment that a row belongs to; only with ``maps=True``."""
    stream_map: Tensor | None = None
    """``[N, S]`` int32 frame, counted over all segments, whose id stands there; -1 for fills and special ids. Only
    with ``maps=True``."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        return PackedBatch(
            *(t if t is None else t.to(device, non_blocking=non_blocking) for t in self._all())
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; a `torch.utils.data.DataLoader` calls this by itself."""
        return PackedBatch(*(t if t is None else t.pin_memory() for t in self._all()))

    def _all(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def delay_pack(
    segments: Sequence[Tensor] | tuple[Tensor, Tensor | Sequence[int]],
    *,
    delays: Sequence[int],
    pad_ids: Sequence[int],
    id_offsets: args.PerSegment | None = None,
    loss_weight: Sequence[Tensor] | Tensor | None = None,
    tail: Literal["keep", "trim"] | int = "keep",
    segment_weight: Tensor | Sequence[Sequence[float]] | None = None,
    prefix: args.Specials | None = None,
    suffix: args.Specials | None = None,
    prefix_weight: args.SpecialWeight = 0.0,
    suffix_weight: args.SpecialWeight = 1.0,
    groups: Tensor | Sequence[int] | None = None,
    tail_ids: Sequence[int] | None = None,
    fill_weight: float = 0.0,
    num_ids: args.PerSegment | None = None,
    dtype: torch.dtype | None = None,
    maps: bool = False,
    check_ids: bool = False,
) -> PackedBatch:
    """Delay-interleave each segment and pack them into one block of rows.

    Row ``t`` of a segment shows ``segment[t - delays[s], s]`` in stream s, or ``pad_ids[s]`` where there is no such
    frame. Delays never cross a segment border. An empty segment is allowed: it becomes ``max(delays)`` rows of pads
    (no row with ``tail="trim"``).

    Args:
        segments: one int32 or int64 ``[T_i, C_i]`` tensor per segment, all of one dtype and device, where the C_i <= S
            columns are the first C_i streams and the others stay pads (text in stream 0 beside codes in all); or the
            pair ``(flat [ΣT, S], offsets [n + 1])`` where ``offsets`` counts frames and is a list or a CPU tensor (a
            CUDA tensor is copied to the host, which waits for the device). Any strides.
        delays: rows by which each stream is shifted, ``S`` values >= 0, S from 1 to 64; any pattern.
        pad_ids: id that fills each stream's gaps, ``S`` values.
        id_offsets: added to every id of a stream, never to fills and special ids; ``S`` values, or ``[n, S]`` for each
            segment its own. Every id that a segment holds counts as real, also one that equals the pad. Sums must fit
            the dtype.
        loss_weight: weight of each id as a label, float, shaped like the segments or like flat; ``None`` is 1 for every
            id of the segments.
        tail: rows that follow a segment's last frame. ``"keep"``: ``max(delays)``, which loses nothing. ``"trim"``: 0;
            the last ``max(delays)`` rows are cut, which loses nothing where a segment ends with as many all-pad
            frames. Or a number in between; `delay_unpack` gives back all but the last ``max(delays) - tail`` frames.
        segment_weight: float ``[n, S]`` factor of the weights of each segment's streams; ``None`` is 1.
        prefix, suffix: special ids written before and after each segment's content, each in a row of its own: in stream
            0 (delayed like it), with pads in the other streams. A list of ints for every segment the same; a list of n
            lists; or a ragged pair ``(ids [P], offsets [n + 1])``.
        prefix_weight, suffix_weight: weight of those ids as labels: one number, or one per id in their order.
        groups: ``[g + 1]`` offsets over the segments: those of one group make up one sequence, in which positions and
            labels run on; ``None``: each segment is a sequence.
        tail_ids: id that fills a stream after a segment's last frame, ``S`` values; ``None``: ``pad_ids``.
        fill_weight: weight of the fills before and after the frames as labels, for models that are trained on them.
        num_ids: ``S`` values or ``[n, S]``: ids, before offsets, must be in ``[0, num_ids)``. Checked on the CPU
            always; on a GPU see ``check_ids``.
        dtype: of ids and labels, int32 or int64; ``None``: that of the segments.
        maps: also write ``segment_map`` and ``stream_map``.
        check_ids: on a GPU, wait for the kernel and raise for an id outside ``num_ids`` or ``dtype``, as the CPU does.
            Without it such an id is written as it is (cut to 32 bits for int32), and nothing waits.

    Returns:
        `PackedBatch` on the segments' device. `delay_unpack` gives back the segments (with ``id_offsets`` added,
        between their special ids).

    Raises:
        OpError: (a ValueError) for a wrong dtype, device, rank or number of streams, offsets that fall or do not end
            at ΣT, a negative delay, a pad id that the dtype cannot hold, or more than 2^31 - 1 rows.
        OpIndexError: (an IndexError too) for an id outside ``num_ids``, or that ``dtype`` cannot hold; segment, frame,
            stream and id are named.

    Example:
        >>> codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> delay_pack([codes], delays=[0, 1, 2], pad_ids=[0, 0, 0]).ids.tolist()
        [[1, 0, 0], [4, 2, 0], [0, 5, 3], [0, 0, 6]]
        >>> delay_pack([codes], delays=[0, 0, 0], pad_ids=[0, 0, 0], prefix=[8], suffix=[9]).ids.tolist()
        [[8, 0, 0], [1, 2, 3], [4, 5, 6], [9, 0, 0]]
    """
    delays, pad_ids, tail_ids = args.shifts(delays, pad_ids, tail_ids)
    S = len(delays)
    tail_rows = args.tail_rows(tail, max(delays))
    widths = None
    if isinstance(segments, tuple) and len(segments) == 2 and not args.is_segment(segments[1]):
        flat, offsets = args.flat_form(segments[0], segments[1], S)  # type: ignore[arg-type]
        num_frames, parts = flat.shape[0], None
    elif len(segments) == 0:
        flat = torch.empty(0, S, dtype=torch.int64, device="cpu")
        offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
        num_frames, parts = 0, None
    else:
        parts = args.list_form(segments, S)  # type: ignore[arg-type]
        borders = [0, *itertools.accumulate(segment.shape[0] for segment in parts)]
        flat, offsets, num_frames = parts[0], torch.tensor(borders, device="cpu"), borders[-1]
        if any(segment.shape[1] != S for segment in parts):
            widths = [segment.shape[1] for segment in parts]
    n = offsets.shape[0] - 1
    dtype = flat.dtype if dtype is None else dtype
    if dtype not in args.ID_DTYPES:
        check(False, f"delay_pack: dtype must be int32 or int64; got {dtype}")
    args.check_fits(pad_ids, "pad_ids", dtype)
    if tail_ids is not pad_ids:
        args.check_fits(tail_ids, "tail_ids", dtype)
    table, counts = args.make_table(
        offsets,
        num_frames,
        widths,
        (delays, pad_ids, tail_ids),
        tail_rows,
        specials(prefix, suffix, prefix_weight, suffix_weight, n, dtype),
        args.groups(groups, n),
        args.per_segment(id_offsets, "id_offsets", n, S),
        args.per_segment(num_ids, "num_ids", n, S),
        args.factors(segment_weight, n, S),
    )
    rule = (table, counts, float(fill_weight), dtype, bool(maps), bool(check_ids))
    if parts is None:
        weight = args.flat_weight(loss_weight, flat)
        return PackedBatch(*delay_pack_op(flat, weight, *rule))
    weights = args.list_weight(loss_weight, parts)
    return PackedBatch(*delay_pack_segments_op(parts, weights, *rule))


def delay_unpack(ids: Tensor, cu_seqlens: Tensor | Sequence[int], *, delays: Sequence[int]) -> list[Tensor]:
    """Undo the delays of a packed block: the exact inverse of `delay_pack`.

    Args:
        ids: int32 or int64 ``[N, S]`` block, e.g. ``PackedBatch.ids`` or generated rows.
        cu_seqlens: ``[n + 1]`` row at which each segment starts, and N at the end. On a GPU it is copied to the
            host, which waits for the device.
        delays: the delays that the block was packed with, ``S`` values.

    Returns:
        One ``[rows_i - max(delays), S]`` tensor per segment (no frames if it has fewer rows): views of one flat
        tensor. For a block packed with ``tail="keep"`` that is every segment as it was, with its id offsets and
        special ids; with ``tail="trim"`` the segments without their last ``max(delays)`` frames. Segments that were
        grouped come back as one.

    Raises:
        OpError: (a ValueError) for a wrong dtype, rank, number of streams, or ``cu_seqlens`` that do not start at 0,
            fall, or do not end at N.
    """
    delays = int_list(delays, "delay_unpack: delays")
    check(len(delays) >= 1, "delay_unpack: delays must have at least one value")
    args.check_segment("delay_unpack: ids", ids, len(delays))
    borders = args.host_tensor(cu_seqlens, torch.int64)
    check(
        borders.dim() == 1 and len(borders) >= 1,
        f"delay_unpack: cu_seqlens must be [n + 1]; got {describe(cu_seqlens)}",
    )
    check(min(delays) >= 0, f"delay_unpack: delays must be 0 or more rows; got {delays}")
    lengths = (borders.diff() - max(delays)).clamp_(min=0).tolist()
    flat = torch.ops.speechlm_ext.delay_unpack(ids, borders, delays, sum(lengths))
    return list(flat.split(lengths)) if lengths else []


class DelayUnpacker:
    """Undo the delays of rows that arrive a few at a time, as in streaming: a frame comes out as soon as its last
    stream has arrived, which is ``max(delays)`` rows after its first.

    Example:
        >>> unpacker = DelayUnpacker([0, 1])
        >>> [unpacker.push(torch.tensor([row])).tolist() for row in ([1, 0], [2, 7], [3, 8])]
        [[], [[1, 7]], [[2, 8]]]
    """

    def __init__(self, delays: Sequence[int]) -> None:
        """``delays``: those that the rows were packed with, ``S`` values.

        Raises:
            OpError: (a ValueError) for no delays or negative ones.
        """
        self.delays = int_list(delays, "DelayUnpacker: delays")
        check(
            1 <= len(self.delays) <= args.MOST_STREAMS and min(self.delays) >= 0,
            f"DelayUnpacker: delays must be 0 or more rows for 1 to {args.MOST_STREAMS} streams; got {self.delays}",
        )
        self._open: Tensor | None = None

    def push(self, rows: Tensor) -> Tensor:
        """Take the next rows and return the frames that they complete.

        Args:
            rows: int32 or int64 ``[n, S]``, or ``[B, n, S]`` for B sequences in step; n may be 0.

        Returns:
            ``[m, S]`` or ``[B, m, S]`` frames in their order. Over all calls they are what `delay_unpack` gives for all
            rows at once.

        Raises:
            OpError: (a ValueError) for a wrong dtype, rank or number of streams, or for rows that do not fit the ones
                before (`reset` begins anew).
        """
        S = len(self.delays)
        check(
            isinstance(rows, Tensor)
            and rows.dim() in (2, 3)
            and rows.dtype in args.ID_DTYPES
            and rows.shape[-1] == S,
            f"DelayUnpacker: rows must be int32 or int64 [n, {S}] or [B, n, {S}]; got {describe(rows)}",
        )
        if self._open is not None:
            before = self._open
            check(
                rows.shape[:-2] == before.shape[:-2]
                and rows.dtype == before.dtype
                and rows.device == before.device,
                f"DelayUnpacker: rows is {describe(rows)}, but the rows before were like {describe(before)}; "
                "call reset() before other sequences",
            )
            rows = torch.cat([before, rows], dim=-2)
        length, most = rows.shape[-2], max(self.delays)
        self._open = rows[..., max(0, length - most) :, :].clone()
        sequences = rows.shape[0] if rows.dim() == 3 else 1
        complete = max(0, length - most)
        borders = torch.arange(sequences + 1, device="cpu") * length
        flat = torch.ops.speechlm_ext.delay_unpack(
            rows.reshape(-1, S), borders, self.delays, sequences * complete
        )
        return flat.view(*rows.shape[:-2], complete, S)

    def reset(self) -> None:
        """Forget all rows: the next ones begin other sequences."""
        self._open = None
