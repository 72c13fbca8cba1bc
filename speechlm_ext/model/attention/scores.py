"""Attention beyond ``softmax(q·k · scale)``: sliding windows, soft caps and sinks, on dense blocks.

* window w: a row sees itself and the w - 1 rows before it (Mistral, Qwen2, Gemma 2 and 3, gpt-oss).
* softcap c: a score becomes ``c · tanh(score / c)`` before the mask (Gemma 2; Gemma Team 2024, section 2).
* sinks: each head has a learned score that takes part in the softmax and has no value (gpt-oss; Xiao et al. 2023).

SDPA computes the first through a mask. The other two are computed here from their definition, in float32 or float64,
with the scores of the whole block in memory.

Axes: B blocks, H heads, G key/value heads, T queries, K keys, E head size of q and k, F head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """How one layer turns queries and keys into weights."""

    scale: float
    """Factor on ``q·k``."""
    window: int | None = None
    """Rows that a row attends to, itself included; None: all before it."""
    softcap: float | None = None
    """Bound on the scores; None for none."""
    sinks_H: Tensor | None = None
    """Float ``[H]``, score of each head's sink; None for none."""

    @property
    def is_plain(self) -> bool:
        """Whether SDPA can compute it, given a mask for the window."""
        return self.softcap is None and self.sinks_H is None

    def describe(self) -> str:
        """Parts beyond plain attention, for messages; empty if there are none."""
        parts = [
            (self.window is not None, "a sliding window"),
            (self.softcap is not None, "capped scores"),
            (self.sinks_H is not None, "attention sinks"),
        ]
        return ", ".join(words for given, words in parts if given)


def causal_mask(query_T: Tensor, num_keys: int, window: int | None, first_key: int = 0) -> Tensor:
    """Bool ``[..., T, K]``: keys visible to queries at positions ``query_T`` (int ``[..., T]``).

    Args:
        num_keys: K; the keys' positions are ``first_key`` to ``first_key + K - 1``.
        window: as in :class:`ScoreRule`.
    """
    key_K = torch.arange(first_key, first_key + num_keys, device=query_T.device)
    mask = key_K <= query_T[..., None]
    if window is not None:
        mask = mask & (key_K > query_T[..., None] - window)
    return mask


def dense_attention(
    q_BHTE: Tensor, k_BGKE: Tensor, v_BGKF: Tensor, rule: ScoreRule, mask: Tensor | None
) -> Tensor:
    """Attention of dense blocks.

    Args:
        q_BHTE, k_BGKE, v_BGKF: float; H a multiple of G.
        rule: its window must be in ``mask`` already.
        mask: bool, broadcastable to ``[B, 1, T, K]``, True for visible keys; None: causal, with T = K.

    Returns:
        float ``[B, H, T, F]``.
    """
    H, G = q_BHTE.shape[1], k_BGKE.shape[1]
    if rule.is_plain:
        return F.scaled_dot_product_attention(
            q_BHTE,
            k_BGKE,
            v_BGKF,
            attn_mask=mask,
            is_causal=mask is None,
            scale=rule.scale,
            enable_gqa=H != G,
        )
    B, T, K = q_BHTE.shape[0], q_BHTE.shape[2], k_BGKE.shape[2]
    if mask is None:
        mask = causal_mask(torch.arange(T, device=q_BHTE.device), K, None)
    # Query heads that share keys are rows of one product: no copies of keys and values.
    q_BGQE = q_BHTE.reshape(B, G, H // G * T, q_BHTE.shape[-1])
    wide = torch.float64 if q_BHTE.dtype == torch.float64 else torch.float32
    scores = (q_BGQE @ k_BGKE.transpose(-1, -2)).to(wide).view(B, H, T, K) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks_H is None:
        weights = scores.softmax(-1)
    else:
        sinks = rule.sinks_H.to(wide).view(1, H, 1, 1).expand(B, H, T, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    out_BGQF = weights.to(v_BGKF.dtype).reshape(B, G, H // G * T, K) @ v_BGKF
    return out_BGQF.reshape(B, H, T, v_BGKF.shape[-1])
