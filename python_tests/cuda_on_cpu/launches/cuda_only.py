"""Ops that torch has on CUDA alone, on tensors of the CPU: products of 16-bit matrices summed in float32, and
attention over packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # noqa: F401 - defines the ops of torch_attn
from torch import Tensor


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a.to(dtype), b.to(dtype))


def _mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _addmm_out(
    c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    return torch.addmm(c.to(dtype), a.to(dtype), b.to(dtype), beta=beta, alpha=alpha, out=out)


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal, ``[H, T, T]`` of float32 ``[T, H, E]``."""
    scores = torch.einsum("ihe,jhe->hij", q, k) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def _each_head(x: Tensor, num_heads: int) -> Tensor:
    """``[T, G, E]`` -> ``[T, H, E]``: each key/value head for the query heads that share it."""
    return x.repeat_interleave(num_heads // x.shape[1], 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if rest[4] is None else rest[4]
    out = torch.empty_like(q)
    bounds = cu.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        keys, values = (_each_head(x[a:b].float(), q.shape[1]) for x in (k, v))
        p = _probabilities(q[a:b].float(), keys, scale)
        out[a:b] = torch.einsum("hij,jhe->ihe", p, values).to(q.dtype)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if rest[5] is None else rest[5]
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    bounds = cu.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        q_, o_, g_ = (x[a:b].float() for x in (q, out, grad))
        k_, v_ = (_each_head(x[a:b].float(), q.shape[1]) for x in (k, v))
        p = _probabilities(q_, k_, scale)
        into = torch.einsum("ihe,jhe->hij", g_, v_) - (g_ * o_).sum(-1).T[:, :, None]
        scores = p * into * scale
        grads[0][a:b] = torch.einsum("hij,jhe->ihe", scores, k_).to(q.dtype)
        for into_, by_head in ((grads[1], (scores, q_)), (grads[2], (p, g_))):
            whole = torch.einsum("hij,ihe->jhe", *by_head)
            into_[a:b] = whole.unflatten(1, (k.shape[1], -1)).sum(2).to(q.dtype)
    return grads


#: Op -> what computes it here.
OPS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _mm,
    torch.ops.aten.mm.dtype_out: _mm_out,
    torch.ops.aten.addmm.dtype_out: _addmm_out,
    torch.ops.torch_attn._varlen_attn.default: _varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
}
