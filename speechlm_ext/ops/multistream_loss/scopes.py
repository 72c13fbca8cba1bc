"""Scopes of multistream_loss: the ids of each softmax, and the rows of the weight that give their logits.

With a shared head an id is its row of the weight. With separate heads each stream has its own rows: the ids of its
scope in ascending order, stream after stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError


class Interval(NamedTuple):
    """Ids ``start`` to ``end - 1``, whose logits come from the weight's rows ``row`` to ``row + num_ids - 1``."""

    start: int
    end: int
    row: int

    @property
    def num_ids(self) -> int:
        return self.end - self.start


#: The scope of each stream.
Scopes = tuple[tuple[Interval, ...], ...]
#: The scopes of each kind of row; one kind unless ``row_scope`` is given.
ScopeSets = tuple[Scopes, ...]
GivenScopes = Sequence[Sequence[tuple[int, int]]]


def read_scopes(sets: Sequence[GivenScopes], vocab: int | None, separate: bool) -> tuple[ScopeSets, int]:
    """Checked scopes with the weight's rows of each interval.

    ``sets``: per kind of row, per stream, the intervals ``(start, end)``. ``vocab``: ids of a shared head; None for
    separate heads, where each stream has its own rows. Also returns the number of rows that the weight must have: at
    least (shared) or exactly (separate).
    """
    op = "multistream_loss"
    ordered = []
    for kind, scopes in enumerate(sets):
        where = f"scopes[{kind}]" if len(sets) > 1 else "scopes"
        if not len(scopes) == len(sets[0]) > 0:
            raise OpError(f"{op}: {where} must hold one scope per stream ({len(sets[0])}); got {len(scopes)}")
        for s, scope in enumerate(scopes):
            if len(scope) == 0:
                raise OpError(f"{op}: {where}[{s}] is empty")
            for start, end in scope:
                if not (0 <= start < end and (vocab is None or end <= vocab)):
                    ids = "ids" if vocab is None else f"the {vocab} ids of weight"
                    raise OpError(
                        f"{op}: {where}[{s}] has ({start}, {end}), which is not an interval of {ids}"
                    )
            by_start = sorted((int(start), int(end)) for start, end in scope)
            for (_, end), (start, _) in pairwise(by_start):
                if end > start:
                    raise OpError(f"{op}: the intervals of {where}[{s}] overlap: {by_start}")
        ordered.append([[Interval(int(a), int(b), int(a)) for a, b in scope] for scope in scopes])
    rows = max(i.end for scopes in ordered for scope in scopes for i in scope)
    if separate:
        rows = 0
        for s in range(len(ordered[0])):
            head = []
            for interval in merge([i for scopes in ordered for i in scopes[s]]):
                head.append(interval._replace(row=rows))
                rows += interval.num_ids
            for kind_scopes in ordered:
                kind_scopes[s] = [i._replace(row=_row_in(head, i.start)) for i in kind_scopes[s]]
    return tuple(tuple(merge(scope) for scope in scopes) for scopes in ordered), rows


def merge(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Intervals sorted by row, with touching and overlapping ones joined."""
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (i.row, i.end)):
        last = merged[-1] if merged else None
        if last and interval.row - last.row == interval.start - last.start <= last.num_ids:
            merged[-1] = last._replace(end=max(interval.end, last.end))
        else:
            merged.append(interval)
    return tuple(merged)


def _row_in(head: Sequence[Interval], start: int) -> int:
    return next(i.row + start - i.start for i in head if i.start <= start < i.end)


def flatten(sets: ScopeSets) -> list[int]:
    """Scopes as one list of ints, for the op's schema: per stream the number of its intervals, then their fields."""
    return [
        value
        for scopes in sets
        for scope in scopes
        for value in (len(scope), *(number for interval in scope for number in interval))
    ]


def unflatten(flat: Sequence[int], num_streams: int) -> ScopeSets:
    """Inverse of `flatten`."""
    scopes, at = [], 0
    while at < len(flat):
        end = at + 1 + 3 * flat[at]
        scopes.append(tuple(Interval(*flat[i : i + 3]) for i in range(at + 1, end, 3)))
        at = end
    return tuple(tuple(scopes[i : i + num_streams]) for i in range(0, len(scopes), num_streams))


def local_targets(targets: Tensor, scope: Sequence[Interval]) -> Tensor:
    """Index of each target among the ids of its scope; -1 outside it."""
    local = torch.full_like(targets, -1)
    base = 0
    for interval in scope:
        inside = (targets >= interval.start) & (targets < interval.end)
        local = torch.where(inside, targets - interval.start + base, local)
        base += interval.num_ids
    return local


def as_index(numbers: Sequence[int]) -> slice | list[int]:
    """Ascending numbers as an index; a slice if they are consecutive, which needs no copy to a GPU."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else list(numbers)


#: Columns per cache line of float32. The logits of each interval start on one: products with other rows take up to a
#: third longer.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Streams whose logits come from one product."""

    root: tuple[Interval, ...]
    """The rows of the weight whose logits are computed."""
    begins: tuple[int, ...]
    """First column of each interval's logits."""
    columns: int
    """Columns of a row of logits; those after an interval's end belong to no stream."""
    streams: tuple[int, ...]
    slices: tuple[tuple[tuple[int, int, int], ...], ...]
    """Per stream, its scope as ``(first id, first column, count)``."""

    @property
    def index(self) -> slice | list[int]:
        """The streams as an index."""
        return as_index(self.streams)

    def row_of(self, column: int) -> int:
        """The weight's row of a column of the logits."""
        for interval, begin in zip(self.root, self.begins, strict=True):
            if begin <= column < begin + interval.num_ids:
                return interval.row + column - begin
        raise AssertionError(f"column {column} of {self} belongs to no interval")


@lru_cache(maxsize=64)
def group_streams(scopes: Scopes) -> tuple[Group, ...]:
    """One group of stream 0 and all streams whose scopes are inside its own, one of the others.

    Streams after the first are live in nearly the same rows (a frame has all its codes), stream 0 in others too (text).
    """
    first = [s for s, scope in enumerate(scopes) if _covers(scopes[0], scope)]
    rest = [s for s in range(len(scopes)) if s not in first]
    return tuple(_group(scopes, members) for members in (first, rest) if members)


@lru_cache(maxsize=64)
def group_all(scopes: Scopes) -> Group:
    """All streams in one product."""
    return _group(scopes, range(len(scopes)))


def _group(scopes: Scopes, members: Sequence[int]) -> Group:
    # The root's ids are rows of the weight.
    root = merge([i._replace(start=i.row, end=i.row + i.num_ids) for s in members for i in scopes[s]])
    begins = [0]
    for interval in root:
        begins.append(begins[-1] + -(-interval.num_ids // _ALIGNMENT) * _ALIGNMENT)

    def place(interval: Interval) -> tuple[int, int, int]:
        outer, begin = next(
            (o, b) for o, b in zip(root, begins[:-1], strict=True) if _covers([o], [interval])
        )
        return interval.start, begin + interval.row - outer.row, interval.num_ids

    slices = tuple(tuple(place(interval) for interval in scopes[s]) for s in members)
    return Group(root, tuple(begins[:-1]), begins[-1], tuple(members), slices)


def _covers(outer: Sequence[Interval], inner: Sequence[Interval]) -> bool:
    return all(any(o.row <= i.row and i.row + i.num_ids <= o.row + o.num_ids for o in outer) for i in inner)
