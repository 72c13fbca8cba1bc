"""Sequences of a packed row, and their layout as padded groups of similar length for SDPA.

Axes: N packed positions, B sequences of a group, T its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: A padded group takes sequences down to this share of its longest one, which bounds padding to 1/3.
GROUP_RATIO = 0.75


@dataclass
class Packing:
    """Sequences of a packed row, prepared once per batch and shared by all layers."""

    cu_seqlens: Tensor
    """int32 ``[n+1]``: sequence i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``."""
    bounds: list[int]
    """The same on the host."""
    groups: list[tuple[Tensor, int]] = field(default_factory=list)
    """For SDPA: ``(rows [B*T], T)`` per padded group; a padded slot repeats the sequence's last row."""
    unpad: Tensor | None = None
    """For SDPA: int64 ``[N]``, place of each row in the concatenation of all groups."""

    @classmethod
    def build(cls, cu_seqlens: Tensor, kernel: str, bounds: Sequence[int] | None = None) -> Packing:
        """Prepare for ``kernel`` (from :func:`choose_attention`).

        Args:
            bounds: ``cu_seqlens`` on the host; None reads them, which waits for a GPU.
        """
        packing = cls(cu_seqlens, cu_seqlens.tolist() if bounds is None else list(bounds))
        if kernel == "sdpa":
            packing.pad()
        return packing

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return max((b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)), default=0)

    def pad(self) -> Tensor:
        """Lay out the padded groups, once; returns ``unpad``."""
        if self.unpad is not None:
            return self.unpad
        bounds, device = self.bounds, self.cu_seqlens.device
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        unpad = torch.empty(bounds[-1], dtype=torch.int64)
        base = first = 0
        while first < len(order):
            longest = lengths[order[first]]
            last = first
            while last < len(order) and lengths[order[last]] >= GROUP_RATIO * longest:
                last += 1
            members = order[first:last]
            starts = torch.tensor([bounds[i] for i in members])
            sizes = torch.tensor([lengths[i] for i in members])
            slots = torch.arange(longest)
            rows = starts[:, None] + torch.minimum(slots[None], sizes[:, None] - 1)
            real = slots[None] < sizes[:, None]
            unpad[rows[real]] = base + torch.arange(rows.numel()).view_as(rows)[real]
            self.groups.append((rows.reshape(-1).to(device), longest))
            base += rows.numel()
            first = last
        self.unpad = unpad.to(device)
        return self.unpad


class Gather(torch.autograd.Function):
    """Rows of ``x`` in padded order; each real row appears once among the real slots.

    The backward reads only the real slots. That is exact: attention is causal and padding follows
    every real row of its sequence, so no gradient reaches a padded slot.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Ungather(torch.autograd.Function):
    """The inverse of :class:`Gather`: real slots back to packed order."""

    @staticmethod
    def forward(ctx, x: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        padded = grad.new_zeros(ctx.num_slots, *grad.shape[1:])
        padded.index_copy_(0, ctx.saved_tensors[0], grad)
        return padded, None
