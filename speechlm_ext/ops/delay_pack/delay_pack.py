"""delay_pack: ragged id segments to one packed, delay-interleaved block, in one fused pass.

Stream s of a segment is shifted right by ``delays[s]`` rows, so a model that predicts one row at a time predicts
stream s of a frame after stream 0 of it (the delay pattern of MusicGen, Copet et al. 2023). The same pass adds id
offsets, writes special ids around each segment, and next-row labels, loss weights, positions and ``cu_seqlens``.

On the CPU the list form reads the segments at their own addresses. `torch.compile` captures the flat form
``(flat, offsets)`` as one graph for any number of segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import ID_DTYPES, OpError
from speechlm_ext.ops.delay_pack.arguments import (
    PerSegment,
    Specials,
    SpecialWeight,
    check_fits,
    read_offsets,
    read_per_segment,
    read_segments,
    read_shifts,
    read_tail_rows,
    read_weight,
)
from speechlm_ext.ops.delay_pack.op import PackArgs, run_pack
from speechlm_ext.ops.delay_pack.special_ids import specials
from speechlm_ext.ops.delay_pack.table import Columns, make_table


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A packed block of N rows, S streams and n sequences: the input of a multi-stream language model."""

    ids: Tensor
    """int32 or int64 ``[N, S]``: model input."""
    labels: Tensor
    """``[N, S]``, dtype of ``ids``: ids of the next row of the same sequence; pads in each sequence's last row."""
    loss_weight: Tensor
    """float32 ``[N, S]``: weight of each label; 0 where there is nothing to learn."""
    position: Tensor
    """int32 ``[N]``: row within its sequence, from 0."""
    cu_seqlens: Tensor
    """int32 ``[n + 1]``: row at which each sequence starts, and N at the end."""
    segment_map: Tensor | None = None
    """int32 ``[N]``: index of each row's segment; None unless ``maps=True``."""
    stream_map: Tensor | None = None
    """int32 ``[N, S]``: frame of each id, counted over all segments; -1 for pads and special ids. None unless
    ``maps=True``."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        return PackedBatch(
            *(t if t is None else t.to(device, non_blocking=non_blocking) for t in self._all())
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        return PackedBatch(*(t if t is None else t.pin_memory() for t in self._all()))

    def _all(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def delay_pack(
    segments: Sequence[Tensor] | tuple[Tensor, Tensor | Sequence[int]],
    *,
    delays: Sequence[int],
    pad_ids: Sequence[int],
    id_offsets: PerSegment | None = None,
    loss_weight: Sequence[Tensor] | Tensor | None = None,
    tail: Literal["keep", "trim"] | int = "keep",
    segment_weight: Tensor | Sequence[Sequence[float]] | None = None,
    prefix: Specials | None = None,
    suffix: Specials | None = None,
    prefix_weight: SpecialWeight = 0.0,
    suffix_weight: SpecialWeight = 1.0,
    groups: Tensor | Sequence[int] | None = None,
    tail_ids: Sequence[int] | None = None,
    fill_weight: float = 0.0,
    num_ids: PerSegment | None = None,
    dtype: torch.dtype | None = None,
    maps: bool = False,
    check_ids: bool = False,
) -> PackedBatch:
    """Delay-interleave each segment and pack them into one block of rows.

    Row ``t`` of a segment has ``segment[t - delays[s], s]`` in stream s, or ``pad_ids[s]`` if there is no such frame.
    Delays never cross a segment border. An empty segment becomes ``max(delays)`` rows of pads (no row with
    ``tail="trim"``).

    Args:
        segments: one int32 or int64 ``[T_i, C_i]`` tensor per segment, all of one dtype and device; the C_i <= S
            columns are the first C_i streams, the others are padded (text in stream 0 beside codes in all). Or the pair
            ``(flat [ΣT, S], offsets [n + 1])`` where ``offsets`` counts frames and is a list or a CPU tensor (a CUDA
            tensor is copied to the host, which synchronizes). Any strides.
        delays: rows by which each stream is shifted, ``S`` values >= 0, S from 1 to 64; any pattern.
        pad_ids: pad id of each stream, ``S`` values.
        id_offsets: added to every id of a stream, but not to pads and special ids; ``S`` values, or ``[n, S]``, a row
            for each segment. Ids of a segment that equal the pad are content too. Sums must fit the dtype.
        loss_weight: weight of each id as a label, float, shaped like the segments or like flat; ``None`` is 1 for every
            id of the segments.
        tail: rows after a segment's last frame. ``"keep"``: ``max(delays)``, which is lossless. ``"trim"``: 0; the last
            ``max(delays)`` rows are cut, which is lossless if a segment ends with that number of all-pad frames. Or a
            number between; `delay_unpack` then returns all but the last ``max(delays) - tail`` frames.
        segment_weight: float ``[n, S]``, factor of the weights of each segment's streams; ``None`` is 1.
        prefix, suffix: special ids before and after each segment's content, one per row: in stream 0 (delayed like it),
            with pads in the other streams. One list of ints for all segments; a list of n lists; or a ragged pair
            ``(ids [P], offsets [n + 1])``.
        prefix_weight, suffix_weight: weight of those ids as labels: one number, or one per id in their order.
        groups: ``[g + 1]`` offsets over the segments: each group is one sequence, with continuous positions and labels;
            ``None``: each segment is a sequence.
        tail_ids: pad id of each stream after a segment's last frame, ``S`` values; ``None``: ``pad_ids``.
        fill_weight: weight of the pads before and after the frames as labels, for models that are trained on them.
        num_ids: ``S`` values or ``[n, S]``: ids, before offsets, must be in ``[0, num_ids)``. Always checked on the
            CPU; on a GPU see ``check_ids``.
        dtype: of ids and labels, int32 or int64; ``None``: that of the segments.
        maps: also write ``segment_map`` and ``stream_map``.
        check_ids: on a GPU, synchronize and raise for an id outside ``num_ids`` or ``dtype``, as on the CPU. Without it
            there is no synchronization, and such an id is written unchanged (cut to 32 bits for int32).

    Returns:
        `PackedBatch` on the segments' device. `delay_unpack` returns the segments (with ``id_offsets`` added, between
        their special ids).

    Raises:
        OpError: (a ValueError) a wrong dtype, device, rank or number of streams; offsets that fall or do not end at ΣT;
            a negative delay; a pad id that the dtype cannot hold; more than 2^31 - 1 rows; a CUDA stream that is
            capturing a graph.
        OpIndexError: (also an IndexError) an id outside ``num_ids``, or that ``dtype`` cannot hold; the message names
            segment, frame, stream and id.

    Example:
        >>> codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> delay_pack([codes], delays=[0, 1, 2], pad_ids=[0, 0, 0]).ids.tolist()
        [[1, 0, 0], [4, 2, 0], [0, 5, 3], [0, 0, 6]]
        >>> delay_pack([codes], delays=[0, 0, 0], pad_ids=[0, 0, 0], prefix=[8], suffix=[9]).ids.tolist()
        [[8, 0, 0], [1, 2, 3], [4, 5, 6], [9, 0, 0]]
    """
    shifts = read_shifts(delays, pad_ids, tail_ids)
    S = len(shifts[0])
    given = read_segments(segments, S)
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
        groups=None if groups is None else read_offsets(groups, "delay_pack: groups", "g + 1"),
        id_offsets=read_per_segment(id_offsets, "id_offsets", n, S),
        num_ids=read_per_segment(num_ids, "num_ids", n, S),
        segment_weight=read_per_segment(segment_weight, "segment_weight", n, S, torch.float64),
    )
    table, counts = make_table(columns, given.num_frames, read_tail_rows(tail, max(shifts[0])))
    args = PackArgs(table, counts, float(fill_weight), dtype, bool(maps), bool(check_ids))
    return PackedBatch(*run_pack(given.ids, read_weight(loss_weight, given.ids), args))
