"""The host table of `delay_pack`: everything but ids and weights that its kernels read, as one int64 tensor.

Its columns are in the order of DelayPackMeta (csrc/delay_pack/delay_pack.h); `Counts` has their sizes.
The outputs' sizes follow from the counts alone, so a GPU is never synchronized.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.dispatch import can_skip_dispatcher
from speechlm_ext.ops.common.native import OpError

_MAX_ROWS = 2**31 - 1


class Counts(NamedTuple):
    """Sizes of the table's columns, in the order that the kernels read them (DelayPackShape)."""

    segments: int
    groups: int
    """-1: no groups, every segment is a sequence."""
    streams: int
    frames: int
    specials: int
    has_widths: int
    offset_rows: int
    limit_rows: int
    weight_rows: int
    tail: int


def num_rows(counts: Counts) -> int:
    """Rows of the packed block. A function: before torch 2.8, torch.compile knows no property of a named tuple."""
    return counts.frames + counts.specials + counts.segments * counts.tail


class Columns(NamedTuple):
    """Contents of the table."""

    offsets: Tensor
    """int64 ``[n + 1]``: frame at which each segment starts."""
    shifts: tuple[list[int], list[int], list[int]]
    """Delays, pad ids and tail ids, S values each."""
    widths: Sequence[int] | None
    """Streams of each segment; None: all have S."""
    specials: list[Tensor]
    """See `speechlm_ext.ops.delay_pack.special_ids.specials`."""
    groups: Tensor | None
    """int64 ``[g + 1]``."""
    id_offsets: Tensor | None
    """int64 ``[1 or n, S]``."""
    num_ids: Tensor | None
    """int64 ``[1 or n, S]``."""
    segment_weight: Tensor | None
    """float64 ``[n, S]``."""


def make_table(columns: Columns, num_frames: int, tail_rows: int) -> tuple[Tensor, Counts]:
    """The table and its counts; refuses groups that do not rise from 0 to n, and more than 2^31 - 1 rows."""
    offsets, shifts, widths, specials, groups, *per_segment = columns
    n = offsets.shape[0] - 1
    make = _cached_shift_column if can_skip_dispatcher(offsets) else _shift_column
    parts = [offsets, make(*(tuple(values) for values in shifts))]
    num_specials = specials[0].shape[0] if specials else 0
    if num_specials:
        parts += [specials[1], specials[2], specials[0], specials[3].view(torch.int64)]
    if widths is not None:
        width = torch.tensor(widths, dtype=torch.int64, device="cpu")
        size = offsets.diff() * width
        parts += [width, size.cumsum(0) - size]
    if groups is not None:
        parts += _group_columns(groups, n)
    # float64 weights are stored bit by bit.
    parts += [t.contiguous().view(torch.int64).flatten() for t in per_segment if t is not None]
    offset_rows, limit_rows, weight_rows = (0 if t is None else t.shape[0] for t in per_segment)
    counts = Counts(
        segments=n,
        groups=-1 if groups is None else groups.shape[0] - 1,
        streams=len(shifts[0]),
        frames=num_frames,
        specials=num_specials,
        has_widths=int(widths is not None),
        offset_rows=offset_rows,
        limit_rows=limit_rows,
        weight_rows=weight_rows,
        tail=tail_rows,
    )
    if num_rows(counts) > _MAX_ROWS:
        raise OpError(
            f"delay_pack: the block would have {num_rows(counts)} rows, more than cu_seqlens (int32) can hold; "
            "pack fewer segments at a time"
        )
    return torch.cat(parts), counts


def _group_columns(groups: Tensor, num_segments: int) -> list[Tensor]:
    """The group offsets, and the first and end segment of each segment's group."""
    lengths = groups.diff()
    if not torch.compiler.is_compiling() and (  # under compile the kernels check
        int(groups[-1]) != num_segments or int(groups[0]) != 0 or bool((lengths < 0).any())
    ):
        raise OpError(
            f"delay_pack: groups must rise from 0 to {num_segments}, the number of segments; got {groups.tolist()}"
        )
    ends = (groups[:-1], groups[1:])
    return [groups, *(end.repeat_interleave(lengths, output_size=num_segments) for end in ends)]


def _shift_column(delays: tuple[int, ...], pad_ids: tuple[int, ...], tail_ids: tuple[int, ...]) -> Tensor:
    return torch.tensor([*delays, *pad_ids, *tail_ids], dtype=torch.int64, device="cpu")


#: A program has one or two sets of delays and pads, and making the tensor is a sixth of a small call.
_cached_shift_column = lru_cache(maxsize=16)(_shift_column)


def segment_shapes(table: Tensor, counts: Counts) -> list[tuple[int, int]]:
    """``(frames, streams)`` of each segment."""
    n, S = counts.segments, counts.streams
    offsets = table[: n + 1].tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if not counts.has_widths:
        return [(length, S) for length in lengths]
    after = counts.groups + 1 + 2 * n if counts.groups >= 0 else 0
    after += (counts.offset_rows + counts.limit_rows + counts.weight_rows) * S
    first = len(table) - after - 2 * n
    return list(zip(lengths, table[first : first + n].tolist(), strict=True))


def offsets_and_limits(table: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """``id_offsets`` and ``num_ids``, int64 ``[0, 1 or n, S]`` each."""
    S = counts.streams
    end = len(table) - counts.weight_rows * S
    middle = end - counts.limit_rows * S
    start = middle - counts.offset_rows * S
    return table[start:middle].view(-1, S), table[middle:end].view(-1, S)
