"""Attention over packed rows: every rule is its definition, and the choice of the kernel has a reason."""

from __future__ import annotations

import pytest
import torch

from speechlm_ext.model.attention.kernels import Packing, choose_attention, packed_attention
from speechlm_ext.model.attention.scores import ScoreRule


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], rule: ScoreRule
) -> torch.Tensor:
    """Row by row and head by head, from the definition."""
    H, G = q.shape[1], k.shape[1]
    out = torch.zeros(len(q), H, v.shape[-1], dtype=q.dtype)
    first = 0
    for length in lengths:
        for n in range(length):
            low = 0 if rule.window is None else max(0, n - rule.window + 1)
            seen = slice(first + low, first + n + 1)
            for h in range(H):
                scores = k[seen, h // (H // G)] @ q[first + n, h] * rule.scale
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                if rule.sinks_H is not None:
                    scores = torch.cat((scores, rule.sinks_H[h : h + 1]))
                weights = scores.softmax(0)[: seen.stop - seen.start]
                out[first + n, h] = weights @ v[seen, h // (H // G)]
        first += length
    return out


@pytest.mark.parametrize(
    "window, softcap, sinks",
    [
        (None, None, False),
        (3, None, False),
        (None, 0.7, False),
        (4, 1.5, True),
        (1, None, True),
        (50, None, False),
    ],
)
@pytest.mark.parametrize("V", [8, 6])
def test_score_rules_match_their_definition(
    window: int | None, softcap: float | None, sinks: bool, V: int
) -> None:
    """Values and gradients against loops in float64; values as wide as keys or not; sinks have gradients too."""
    lengths, H, G, E = [9, 1, 5, 8, 2], 4, 2, 8
    N = sum(lengths)
    shapes = ((N, H, E), (N, G, E), (N, G, V))
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    sink = torch.randn(H, dtype=torch.float64, requires_grad=True)
    rule = ScoreRule(E**-0.5, window, softcap, sink if sinks else None)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = packed_attention(q, k, v, Packing.build(bounds, "sdpa"), rule)
    right = naive(q, k, v, lengths, rule)
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-10)
    coefficient, inputs = torch.randn_like(right), (q, k, v, *((sink,) if sinks else ()))
    ours = torch.autograd.grad((out * coefficient).sum(), inputs)
    theirs = torch.autograd.grad((right * coefficient).sum(), inputs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_attention_choice_says_why() -> None:
    name, reason = choose_attention("cpu", torch.float32)
    assert name == "packed" and "no CUDA device" in reason
    name, reason = choose_attention("cpu", torch.bfloat16)
    assert name == "sdpa" and "no CUDA device" in reason
