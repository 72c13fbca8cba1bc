"""The parts of a packed layer in plain torch: oracle and baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[N, D]``, ``[D]`` -> ``[N, D]``."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def packed_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[N, H, E]``, ``[N, E]`` twice -> ``[N, H, E]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def packed_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``[N, I]`` twice -> ``[N, I]``."""
    return torch.nn.functional.silu(gate) * up


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """``[N, H, E]``, ``[N, G, E]`` twice -> ``[N, H, E]``, sequence by sequence."""
    outputs, shared = [q[:0]], q.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        row = torch.arange(end - start)
        is_seen = row <= row[:, None]
        if window is not None:
            is_seen = is_seen & (row > row[:, None] - window)
        keys, values = (x[start:end].repeat_interleave(shared, 1) for x in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q[start:end], keys) * scale
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhe->ihe", weights, values))
    return torch.cat(outputs)
