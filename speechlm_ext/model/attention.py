"""Attention over packed rows: the one file that decides which kernel runs.

Order of choice: flash-attn varlen, torch's ``varlen_attn``, SDPA. The first two read the packed row as
it is; SDPA gathers the segments into padded groups of similar length, so that its cost follows the
segments and not the square of the pack. All three are registered with transformers as one attention
implementation, ``speechlm``, so any of its causal LMs can be the backbone.

Axes: N packed positions, H heads, G key/value heads, E head size, B segments of a group, T its longest.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

if TYPE_CHECKING:
    from speechlm_ext.model.kv_cache import KVCache

NAME = "speechlm"
#: A padded group takes segments down to this share of its longest one, which bounds padding to 1/3.
GROUP_RATIO = 0.75


def choose_attention(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Say which attention will run for packed rows, and why.

    Args:
        device: where the model runs.
        dtype: the dtype of its activations.

    Returns:
        ``(name, reason)`` with name ``flash-attn``, ``varlen_attn`` or ``sdpa``.
    """
    return _choose(torch.device(device).type, dtype)


@functools.cache
def _choose(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    if device_type != "cuda":
        return "sdpa", f"no CUDA device in use ({device_type}); SDPA over padded groups of segments"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"variable-length kernels take fp16 or bf16, not {dtype}; train in bf16 to use them"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash-attn", "flash_attn is installed"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "varlen_attn", "flash_attn is not installed; torch has varlen_attn"
    return (
        "sdpa",
        "neither flash_attn nor torch's varlen_attn is there; pip install 'speechlm_ext[flash]' for speed",
    )


@dataclass
class Packing:
    """Where the segments of a packed row lie, prepared once per batch and shared by all layers."""

    cu_seqlens: Tensor
    """int32 ``[n+1]``: segment i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``."""
    max_seqlen: int
    """Rows of the longest segment."""
    groups: list[tuple[Tensor, int]] = field(default_factory=list)
    """For SDPA: ``(rows [B*T], T)`` per padded group; a padded slot repeats the segment's last row."""
    unpad: Tensor | None = None
    """For SDPA: int64 ``[N]``, where each row lies in the concatenation of all groups."""

    @classmethod
    def build(cls, cu_seqlens: Tensor, kernel: str) -> Packing:
        """Prepare for ``kernel`` (from :func:`choose_attention`); reads the lengths on the host once."""
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        packing = cls(cu_seqlens, max(lengths, default=0))
        if kernel != "sdpa":
            return packing
        device = cu_seqlens.device
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
            packing.groups.append((rows.reshape(-1).to(device), longest))
            base += rows.numel()
            first = last
        packing.unpad = unpad.to(device)
        return packing


class _Gather(torch.autograd.Function):
    """Rows of ``x`` in padded order; each real row appears once among the real slots.

    The backward reads only the real slots. That is exact: attention is causal and padding stands behind
    every real row of its segment, so no gradient reaches a padded slot.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Ungather(torch.autograd.Function):
    """The inverse of :class:`_Gather`: real slots back to packed order."""

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


def _grouped_sdpa(q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal SDPA inside each segment; returns ``[N, H, E]``."""
    assert packing.unpad is not None
    qkv = torch.cat((q_NHE, k_NGE, v_NGE), dim=1)
    H, G = q_NHE.shape[1], k_NGE.shape[1]
    padded = _Gather.apply(qkv, torch.cat([rows for rows, _ in packing.groups]), packing.unpad)
    outputs, base = [], 0
    for rows, T in packing.groups:
        q, k, v = (
            padded[base : base + rows.numel()].unflatten(0, (-1, T)).transpose(1, 2).split((H, G, G), dim=1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != G)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        base += rows.numel()
    return _Ungather.apply(torch.cat(outputs), packing.unpad)


def packed_attention(q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention inside each segment of a packed row.

    Args:
        q_NHE, k_NGE, v_NGE: float ``[N, H, E]``, ``[N, G, E]``, ``[N, G, E]``; H a multiple of G.
        packing: the segments, built for the kernel that :func:`choose_attention` names.
        scale: factor on ``q·k``.

    Returns:
        float ``[N, H, E]``.
    """
    kernel, _ = choose_attention(q_NHE.device, q_NHE.dtype)
    if kernel == "sdpa":
        return _grouped_sdpa(q_NHE, k_NGE, v_NGE, packing, scale)
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_NHE, k_NGE, v_NGE, cu, cu, longest, longest, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    repeat = q_NHE.shape[1] // k_NGE.shape[1]
    if repeat > 1:
        k_NGE, v_NGE = k_NGE.repeat_interleave(repeat, 1), v_NGE.repeat_interleave(repeat, 1)
    # The first releases of varlen_attn had is_causal; later ones say the same with window_size.
    causal: dict[str, object] = {"window_size": (-1, 0)}
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        q_NHE, causal = q_NHE * (scale * q_NHE.shape[-1] ** 0.5), {"is_causal": True}
    else:
        causal["scale"] = scale
    return varlen_attn(q_NHE, k_NGE, v_NGE, cu, cu, longest, longest, **causal)


def speechlm_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    kv: KVCache | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The ``speechlm`` implementation for transformers: packed when ``packing`` is given, through the decoder's cache
    when ``kv`` is, else SDPA with a mask.

    Args:
        query, key, value: ``[B, H, T, E]``, ``[B, G, K, E]``, ``[B, G, K, E]``; B is 1 for a packed row.
        attention_mask: bool ``[B, 1, T, K]``, True where a query may look; None with ``packing``.

    Returns:
        ``([B, T, H, E], None)``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv is not None:
        return kv.attend(module.layer_idx, query, key, value, scale), None  # type: ignore[arg-type]
    if packing is not None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return packed_attention(q, k, v, packing, scale).unsqueeze(0), None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, speechlm_attention)
