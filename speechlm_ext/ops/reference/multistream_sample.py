"""Sampling of one token per request in plain torch, with a counter-based random number (Philox 4x32-10).

Philox turns (seed, step, stream) into a uniform number without any state (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011), so a request's tokens do not depend on which other requests share its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 of 4 counter words and 2 key words, each an int64 tensor holding 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps every bit of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def uniform(seed: Tensor, step: Tensor, stream: int | Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1): int64 ``seed``, ``step`` and ``stream`` that broadcast to one shape."""
    zero = torch.zeros_like(seed)
    counter = [step & _MASK32, (step >> 32) & _MASK32, zero + stream, zero]
    words = philox(counter, [seed & _MASK32, (seed >> 32) & _MASK32])
    return ((words[0] << 21) ^ (words[1] >> 11)).double() * 2.0**-53


def lowest_argmax(logits: Tensor) -> Tensor:
    """Index of each row's maximum; the lowest index among equals, on every device."""
    size = logits.shape[-1]
    index = torch.arange(size, device=logits.device)
    is_max = logits == logits.amax(dim=-1, keepdim=True)
    return torch.where(is_max, index, size).amin(dim=-1).clamp_(max=size - 1)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Bool mask of the logits that top-k, then top-p, keep; the token that crosses ``top_p`` is kept.

    Args:
        logits: float ``[B, V]``, -inf where forbidden.
        top_k: int64 ``[B]``; 0 keeps all. Ties at the border go to the lower index.
        top_p: float ``[B]``; 1 keeps all.
    """
    size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(size, device=logits.device)
    k = torch.where(top_k > 0, top_k, size)[:, None]
    ordered = ordered.masked_fill(rank >= k, float("-inf"))
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    keep_ordered = (rank < k) & ((before < top_p[:, None]) | (top_p[:, None] >= 1)) | (rank == 0)
    return torch.zeros_like(keep_ordered).scatter_(-1, order, keep_ordered)


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, number: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one column per row.

    Args:
        logits: float ``[B, V]``, -inf where forbidden.
        temperature, top_k, top_p: ``[B]``; temperature 0 is greedy.
        number: float64 ``[B]`` uniform in [0, 1), used by inverse transform over the columns in order.

    Returns:
        ``(column int64 [B], logprob float32 [B], failed bool [B])``. ``logprob`` is the column's log-probability at
        temperature 1 among all allowed columns. A row with NaN, +inf or nothing allowed has failed: column 0.
    """
    logits = logits.float()
    top = logits.amax(dim=-1)
    failed = logits.isnan().any(dim=-1) | ~top.isfinite()
    logits = torch.where(failed[:, None], torch.zeros_like(logits), logits)
    column = lowest_argmax(logits)
    is_greedy = temperature <= 0
    if not bool(is_greedy.all()):
        scaled = logits / torch.where(is_greedy, torch.ones_like(temperature), temperature)[:, None]
        if bool((top_k > 0).any()) or bool((top_p < 1).any()):
            scaled = scaled.masked_fill(~keep_top(scaled, top_k, top_p), float("-inf"))
        cumulative = scaled.double().softmax(dim=-1).cumsum(dim=-1)
        target = number[:, None] * cumulative[:, -1:]
        drawn = (
            torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
        )
        column = torch.where(is_greedy, column, drawn)
    column = column.masked_fill(failed, 0)
    logprob = logits.log_softmax(dim=-1).gather(-1, column[:, None]).squeeze(-1)
    return column, logprob.masked_fill(failed, 0.0), failed
