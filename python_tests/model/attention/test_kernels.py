"""Attention over packed rows: every rule is its definition, and the choice of the kernel has a reason."""

from __future__ import annotations

import pytest
import torch

from speechlm_ext.model.attention import kernels
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


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("release", ["is_causal", "window_size", "enable_gqa"])
def test_varlen_attn_of_every_release_is_called_as_it_takes_its_arguments(
    release: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three signatures that torch has had; keys are repeated only where grouped heads are not taken."""
    lengths, rule = [9, 1, 5], ScoreRule(0.4, window)
    q, k, v = (torch.randn(15, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    heads: list[int] = []

    def attend(q, k, v, scale, window):  # type: ignore[no-untyped-def]
        heads.append(k.shape[1])
        return naive(q, k, v, lengths, ScoreRule(scale, window))

    def first(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        assert is_causal and max_q == 9
        return attend(q, k, v, 8**-0.5, None)

    def second(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert window_size[1] == 0 and k.shape[1] == q.shape[1]
        return attend(q, k, v, scale, None if window_size[0] < 0 else window_size[0] + 1)

    def third(q, k, v, *bounds, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        assert enable_gqa
        return attend(q, k, v, scale, None if window_size[0] < 0 else window_size[0] + 1)

    calls = {"is_causal": first, "window_size": second, "enable_gqa": third}
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", calls[release])
    monkeypatch.setattr(kernels, "choose_attention", lambda *_: ("varlen_attn", ""))
    kernels._varlen_takes.cache_clear()
    try:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        out = packed_attention(q, k, v, Packing.build(bounds, "varlen_attn"), rule)
    finally:
        kernels._varlen_takes.cache_clear()
    torch.testing.assert_close(out, naive(q, k, v, lengths, rule))
    if release == "is_causal" and window is not None:
        assert heads == []  # SDPA
    else:
        assert heads == [2 if release == "enable_gqa" else 4]
