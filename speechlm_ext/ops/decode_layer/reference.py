"""The ops of a decode layer in plain torch: oracle and baseline. They round where transformers' layers round."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[M, K]``, ``[N, K]``, ``[N]`` or None -> ``[M, N]``."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_last: bool) -> Tensor:
    """RMSNorm over the last axis. ``rounds_last``: the product with the weight comes before the only rounding."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * _wide(weight)).to(x.dtype) if rounds_last else normed.to(x.dtype) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounds_last: bool
) -> tuple[Tensor, Tensor]:
    """``[M, D]`` each: the norm of ``x + residual``, and that sum."""
    summed = x if residual is None else x + residual
    return rms_norm(summed, weight, eps, rounds_last), summed


def rope_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    norm_over_all: bool,
) -> Tensor:
    """Writes ``keys`` and ``values``, ``[B, R, G, E]`` and ``[B, R, G, F]``; gives the queries ``[M, H, E]``."""
    (B, R, G, E), num_values = keys.shape, values.shape[3]
    M = len(qkv)
    query, key, value = qkv.split([num_heads * E, G * E, G * num_values], dim=1)
    is_inside = (position >= 0) & (position < R) & (slot >= 0) & (slot < B)
    if cos is not None:
        is_inside = is_inside & (position < len(cos))

    def normed(x: Tensor, weight: Tensor | None, heads: int) -> Tensor:
        if weight is not None and norm_over_all:
            x = rms_norm(x, weight, norm_eps, rounds_last=True)
        x = x.reshape(M, heads, E)
        if weight is not None and not norm_over_all:
            x = rms_norm(x, weight, norm_eps, rounds_last=False)
        return x

    def rotated(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        index = torch.where(is_inside, position, 0)
        half = torch.cat((-x[..., E // 2 :], x[..., : E // 2]), dim=-1)
        return (x * cos[index][:, None] + half * sin[index][:, None]).to(x.dtype)

    query = rotated(normed(query, q_norm, num_heads))
    key = rotated(normed(key, k_norm, G))
    stored = slot[is_inside], position[is_inside]
    keys[stored], values[stored] = key[is_inside], value.reshape(M, G, num_values)[is_inside]
    return torch.where(is_inside[:, None, None], query, 0)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slot: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[M, H, E]`` -> ``[M, H * F]``; softmax in float32 or float64."""
    (M, H, E), (B, R, G, _), num_values = query.shape, keys.shape, values.shape[3]
    lengths = torch.where((slot >= 0) & (slot < B), lengths.clamp(0, R), 0)
    row = torch.arange(R, device=query.device)
    is_seen = row < lengths[:, None]
    if window is not None:
        is_seen = is_seen & (row >= lengths[:, None] - window)
    index = slot.clamp(0, max(B - 1, 0))
    # What is in rows that are not seen does not matter, not even a NaN.
    k_MRGE = _wide(keys[index]).masked_fill(~is_seen[..., None, None], 0)
    v_MRGF = _wide(values[index]).masked_fill(~is_seen[..., None, None], 0)
    q_MGQE = _wide(query).reshape(M, G, H // max(G, 1), E)
    scores = torch.einsum("mgqe,mrge->mgqr", q_MGQE, k_MRGE) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_seen[:, None, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, G, -1, 1).expand(M, -1, -1, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., :R]
    out = torch.einsum("mgqr,mrgf->mgqf", weights, v_MRGF).reshape(M, H * num_values)
    return torch.where(lengths[:, None] > 0, out, 0).to(query.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``[M, 2 I]`` -> ``[M, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
