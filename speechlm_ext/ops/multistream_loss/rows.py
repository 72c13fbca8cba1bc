"""Which rows each product computes: those in which any of its streams is live.

Their number decides the sizes of the products, so it must be known on the host. For tensors on a GPU that costs one
synchronization, or none where the rows were planned from tensors on the CPU (`plan_loss_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe
from speechlm_ext.ops.multistream_loss.scopes import (
    Group,
    Scopes,
    ScopeSets,
    as_index,
    group_all,
    group_streams,
)

#: All streams share one product if that costs at most this factor of two products.
_ONE_PRODUCT = 1.02


@dataclass(frozen=True, eq=False)
class LossRows:
    """Rows of a call's products, from `speechlm_ext.ops.plan_loss_rows`; for that call's tensors only."""

    index: Tensor
    """int64: the rows of the first product in ascending order, then those of the next one, …"""
    counts: tuple[int, ...]
    """Rows of each product: of each kind of row those of `candidates`, 0 for products that are not computed."""
    num_rows: int
    """N."""
    scopes: tuple[int, ...]
    """`scopes.flatten` of the call's scopes."""

    def to(self, device: torch.device | str) -> LossRows:
        """With the index on a device; the copy to a GPU does not wait for it."""
        if torch.device(device).type == "cuda" and self.index.device.type == "cpu":
            return replace(self, index=self.index.pin_memory().to(device, non_blocking=True))
        return replace(self, index=self.index.to(device))

    def check(self, targets: Tensor, scopes: Sequence[int]) -> None:
        """Raise OpError unless the rows were planned for tensors of these sizes and scopes."""
        if self.num_rows != targets.shape[0] or self.scopes != tuple(scopes):
            raise OpError(
                f"multistream_loss: rows were planned for {self.num_rows} rows of other scopes or another number of "
                f"rows than targets has: {describe(targets)}. Plan them from this batch, with this call's scopes, "
                "row_scope and heads."
            )
        if self.index.device != targets.device:
            raise OpError(
                f"multistream_loss: rows must be on {targets.device} like targets (rows.to(device)); got "
                f"{describe(self.index)}"
            )


def candidates(scopes: Scopes) -> tuple[Group, ...]:
    """Products that may serve a kind of row: one for all streams, or one or both of two others and one for all."""
    groups = group_streams(scopes)
    return groups if len(groups) == 1 else (*groups, group_all(scopes))


def plan_rows(
    sets: ScopeSets, live: Tensor, row_scope: Tensor | None, keep_all: bool = False
) -> list[list[tuple[Group, Tensor]]]:
    """Per kind of row the products with any rows, and their rows int64 ``[R]``, ascending.

    On a GPU this synchronizes once, unless ``keep_all``: every product computes all rows.
    """
    groups = [(kind, group) for kind, scopes in enumerate(sets) for group in candidates(scopes)]
    if keep_all:
        everything = torch.arange(live.shape[0], device=live.device)
        counts = _chosen(sets, [live.shape[0]] * len(groups))
        return _by_kind(sets, [everything[:count] for count in counts])
    kinds = [live if row_scope is None else live & (row_scope == kind)[:, None] for kind in range(len(sets))]
    masks = torch.stack([_any_live(kinds[kind], group.streams) for kind, group in groups])
    counts = _chosen(sets, masks.sum(dim=1).tolist())
    if not masks.is_cuda:
        rows = [mask.nonzero().squeeze(1) for mask, count in zip(masks, counts, strict=True) if count]
    else:  # nonzero would wait for the GPU once more
        order = masks.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        rows = [row[:count] for row, count in zip(order, counts, strict=True) if count]
    return _by_kind(sets, unpack(rows, counts))


def planned_rows(sets: ScopeSets, index: Tensor, counts: Sequence[int]) -> list[list[tuple[Group, Tensor]]]:
    """The same from the fields of a `LossRows`."""
    return _by_kind(sets, list(index.split(list(counts))))


def pack(sets: ScopeSets, live: Tensor, row_scope: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """The fields ``index`` and ``counts`` of a `LossRows`."""
    index, counts = [live.new_zeros(0, dtype=torch.int64)], []
    for scopes, products in zip(sets, plan_rows(sets, live, row_scope), strict=True):
        rows = dict(products)
        for group in candidates(scopes):
            counts.append(len(rows[group]) if group in rows else 0)
            index += [rows[group]] if group in rows else []
    return torch.cat(index), tuple(counts)


def unpack(rows: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor | None]:
    """``rows``, of the products that have any, with None for the others."""
    of_product = iter(rows)
    return [next(of_product) if count else None for count in counts]


def _by_kind(sets: ScopeSets, rows: Sequence[Tensor | None]) -> list[list[tuple[Group, Tensor]]]:
    of_product = iter(rows)
    return [
        [(group, r) for group in candidates(scopes) if (r := next(of_product)) is not None and r.numel()]
        for scopes in sets
    ]


def _any_live(live: Tensor, streams: Sequence[int]) -> Tensor:
    """bool ``[N]``: rows in which any of the streams is live."""
    index = as_index(streams)
    if isinstance(index, slice):
        return live[:, index].any(dim=1)
    return torch.stack([live[:, s] for s in streams]).any(dim=0)


def _chosen(sets: ScopeSets, counts: Sequence[int]) -> list[int]:
    """The counts of all candidates with 0 for those that are not computed."""
    chosen, at = [], 0
    for scopes in sets:
        groups = candidates(scopes)
        given = list(counts[at : at + len(groups)])
        at += len(groups)
        if len(groups) > 1:
            cost = sum(count * group.columns for count, group in zip(given[:-1], groups[:-1], strict=True))
            one = given[-1] * groups[-1].columns <= _ONE_PRODUCT * cost
            given = [0] * (len(groups) - 1) + given[-1:] if one else [*given[:-1], 0]
        chosen += given
    return chosen
