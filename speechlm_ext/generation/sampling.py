"""Choosing one token per request from one stream's logits, in plain torch.

Draws come from a counter: a hash of (seed, target, row, stream) gives the uniform number, so a request's
tokens depend on nothing else, neither on the batch nor on how many tokens others have drawn. The draw goes
through the inverse of the cumulative distribution over tokens in descending order of probability (equal ones
by id), so columns that a request may not use have no influence either.

Axes: B requests, S streams, V columns (the ids of a stream's scope in this batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.generation.request import SamplingSettings


@dataclass(frozen=True)
class SamplingTensors:
    """Settings of a batch as tensors ``[B]``."""

    greedy_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    seed_B: Tensor

    @classmethod
    def of(cls, settings: list[SamplingSettings], device: torch.device) -> SamplingTensors:
        """Collect resolved settings; an absent top-k or top-p becomes one that cuts nothing."""
        unlimited = 2**31

        def tensor(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            tensor([bool(s.greedy) for s in settings], torch.bool),
            tensor([s.temperature or 1.0 for s in settings], torch.float32),
            tensor([s.top_k or unlimited for s in settings], torch.int64),
            tensor([1.0 if s.top_p is None else s.top_p for s in settings], torch.float32),
            tensor([s.seed for s in settings], torch.int64),
        )

    def select(self, keep_B: Tensor) -> SamplingTensors:
        """The same for some requests of the batch."""
        return SamplingTensors(
            self.greedy_B[keep_B],
            self.temperature_B[keep_B],
            self.top_k_B[keep_B],
            self.top_p_B[keep_B],
            self.seed_B[keep_B],
        )


def counter_uniform(seed_B: Tensor, target_B: Tensor, row_B: Tensor, num_streams: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 ``[B, S]``, a pure function of (seed, target, row, stream).

    The mixer is SplitMix64's finaliser (Steele, Lea and Flood, 2014), applied once per coordinate.
    """
    stream_S = torch.arange(num_streams, device=seed_B.device, dtype=torch.int64)
    x_B = _mix(seed_B + _signed(0x9E3779B97F4A7C15))
    x_B = _mix(x_B ^ (row_B + (target_B << 32)))
    x_BS = _mix(x_B[:, None] ^ (stream_S + 1))
    return ((x_BS >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def masked_logprob(logits_BV: Tensor, allowed_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the allowed columns, and which requests have no usable distribution.

    Args:
        logits_BV: any float type. allowed_BV: bool.

    Returns:
        ``(logprob_BV fp32, bad_B bool)``: -inf where not allowed. A request is bad when an allowed logit is
        NaN or +inf, or all of them are -inf; its row then has all its mass in the first column.
    """
    logits_BV = logits_BV.float().masked_fill(~allowed_BV, float("-inf"))
    top_B = logits_BV.amax(dim=1)  # NaN wins in amax
    bad_B = ~torch.isfinite(top_B)
    safe_BV = torch.where(bad_B[:, None], _first_column(logits_BV), logits_BV)
    return torch.log_softmax(safe_BV, dim=1), bad_B


def choose(logprob_BV: Tensor, settings: SamplingTensors, uniform_B: Tensor) -> Tensor:
    """Columns int64 ``[B]``: the most probable one (greedy; lowest id among equals) or a draw.

    Top-k comes first, then top-p on what it leaves: the fewest tokens whose probabilities reach p, the one
    that crosses p included.
    """
    greedy_B = logprob_BV.argmax(dim=1)
    if bool(settings.greedy_B.all()):
        return greedy_B
    # A stable sort leaves equal values in the order of ids.
    sorted_BV, order_BV = (logprob_BV / settings.temperature_B[:, None]).sort(
        dim=1, descending=True, stable=True
    )
    rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
    sorted_BV = sorted_BV.masked_fill(rank_V >= settings.top_k_B[:, None], float("-inf"))
    prob_BV = torch.softmax(sorted_BV.double(), dim=1)
    before_BV = prob_BV.cumsum(dim=1) - prob_BV
    prob_BV = prob_BV.masked_fill((before_BV >= settings.top_p_B[:, None].double()) & (rank_V > 0), 0.0)
    cumulative_BV = prob_BV.cumsum(dim=1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    index_B = (cumulative_BV <= threshold_B1).sum(dim=1)
    # Rounding may leave the threshold at the very end: the last token with a probability is meant then.
    index_B = torch.minimum(index_B, (prob_BV > 0).sum(dim=1) - 1)
    drawn_B = order_BV.gather(1, index_B[:, None])[:, 0]
    return torch.where(settings.greedy_B, greedy_B, drawn_B)


def _first_column(like_BV: Tensor) -> Tensor:
    row = torch.full_like(like_BV, float("-inf"))
    row[:, 0] = 0.0
    return row


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
