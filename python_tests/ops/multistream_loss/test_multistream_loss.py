"""multistream_loss against a float64 loop over tokens, with gradients, and its promises on edges and bad input."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from python_tests.ops.multistream_loss.cases import OPTIONS, SCOPES, named_case, named_formula
from speechlm_ext.ops.multistream_loss import chunks as internals


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", SCOPES)
def test_matches_float64_loop(name, reduction, options):
    scopes, parts, targets, weights = named_case(name)
    hidden, weight, embed, bias = parts
    got = sx.ops.multistream_loss(
        hidden, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias, reduction=reduction,
        **OPTIONS[options],
    )  # fmt: skip
    want, nll = named_formula(scopes, parts, targets, weights, **OPTIONS[options])
    torch.testing.assert_close(got.loss_sum, want)
    torch.testing.assert_close(got.stream_loss.sum(), got.loss_sum)
    if reduction == "none":
        torch.testing.assert_close(got.token_nll, nll)
    got_grads = torch.autograd.grad(got.loss_sum * 3, parts)
    for got_grad, want_grad in zip(got_grads, torch.autograd.grad(want * 3, parts), strict=True):
        torch.testing.assert_close(got_grad, want_grad)


def test_gradients():
    scopes, parts, targets, weights = named_case("full_and_own", num_rows=4)

    def per_token(hidden, weight, embed, bias):
        out = sx.ops.multistream_loss(
            hidden, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias, reduction="none",
            **OPTIONS["all"],
        )  # fmt: skip
        return out.token_nll.pow(2).sum() + out.loss_sum

    assert torch.autograd.gradcheck(per_token, parts)


def test_without_embed_and_bias_and_tied_weight():
    scopes, parts, targets, weights = named_case("full_and_codec")
    hidden, weight, _, _ = parts
    got = sx.ops.multistream_loss(hidden, weight, targets, weights, scopes=scopes)
    want, _ = named_formula(scopes, [hidden, weight, None, None], targets, weights)
    torch.testing.assert_close(got.loss_sum, want)


def test_statistics_per_stream():
    """Counts, weights and correct guesses, with logits that are chosen, not drawn."""
    hidden = torch.eye(4)
    weight = torch.zeros(6, 4)
    weight[2, 0] = weight[4, 1] = weight[3, 2] = 9.0
    targets = torch.tensor([[2, 3], [4, 4], [3, 5], [0, 5]])
    loss_weight = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.0, 0.5], [2.0, 0.0]])
    out = sx.ops.multistream_loss(hidden, weight, targets, loss_weight, scopes=[[(0, 6)], [(3, 6)]])
    assert out.stream_count.tolist() == [3, 3]
    assert out.stream_weight.tolist() == [4.0, 1.5]
    # Stream 0: rows 0 and 1 point at their targets, row 3 is a tie of all ids. Stream 1: row 0 ties, row 1 is right.
    assert out.stream_correct.tolist() == [3, 2]
    assert out.token_nll is None


def test_chunks_change_nothing(monkeypatch):
    scopes, parts, targets, weights = named_case("full_and_own", num_rows=64)
    hidden, weight, embed, bias = parts

    def run(chunk_bytes=None):
        return sx.ops.multistream_loss(
            hidden,
            weight,
            targets,
            weights,
            scopes=scopes,
            stream_embed=embed,
            bias=bias,
            chunk_bytes=chunk_bytes,
        )

    whole = torch.autograd.grad(run().loss_sum, parts)
    monkeypatch.setattr(internals, "MIN_ROWS", 7)
    for got, want in zip(torch.autograd.grad(run(1).loss_sum, parts), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_live_target_gives_zeros_with_gradients(reduction):
    scopes, parts, targets, weights = named_case("full_and_own")
    hidden, weight, embed, _ = parts
    targets = targets.fill_(10**6)  # dead targets may hold anything
    out = sx.ops.multistream_loss(
        hidden, weight, targets, weights * 0, scopes=scopes, stream_embed=embed, reduction=reduction
    )
    assert float(out.loss_sum.detach()) == 0 and out.stream_count.tolist() == [0, 0, 0]
    for grad in torch.autograd.grad(out.loss_sum, parts[:3]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_empty_block():
    hidden = torch.randn(0, 4, requires_grad=True)
    out = sx.ops.multistream_loss(
        hidden, torch.randn(5, 4), torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1), scopes=[[(0, 5)]]
    )
    out.loss_sum.backward()
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_sum_in_float32(dtype):
    scopes, parts, targets, weights = named_case("full_and_own", num_rows=200, width=32)
    narrow = [p.detach().to(dtype).requires_grad_() for p in parts]
    wide = [p.detach().double().requires_grad_() for p in narrow]
    hidden, weight, embed, bias = narrow
    got = sx.ops.multistream_loss(
        hidden, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias
    ).loss_sum
    assert got.dtype == torch.float32
    want = sx.ops.multistream_loss(
        wide[0], wide[1], targets, weights, scopes=scopes, stream_embed=wide[2], bias=wide[3]
    ).loss_sum
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)  # rounding of the result, or of float32 sums
    pairs = zip(torch.autograd.grad(got, narrow), torch.autograd.grad(want, wide), strict=True)
    for got_grad, want_grad in pairs:
        assert got_grad.dtype == dtype
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=tolerance, atol=tolerance)


def test_under_no_grad():
    scopes, parts, targets, weights = named_case("full_and_own", dtype=torch.float32)

    def call():
        return sx.ops.multistream_loss(parts[0], parts[1], targets, weights, scopes=scopes).loss_sum

    plain = call()
    with torch.no_grad():
        quiet = call()
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, plain.detach())


H, W = torch.zeros(3, 4), torch.zeros(10, 4)
T, L = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
TWO = [[(0, 10)], [(0, 10)]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H[0], W, T, L), {}, r"hidden must be float \[N, D\]"),
        ((H, W[:, :3], T, L), {}, r"weight must be float \[V, 4\]"),
        ((H, W.new_empty(0), T, L), {}, "ZeRO-3"),
        ((H, W, T[:, :1], L), {}, r"targets must be .* \[3, 2\]"),
        ((H, W, T.float(), L), {}, "targets must be int32 or int64"),
        ((H, W, T, L[:2]), {}, r"loss_weight must be float \[3, 2\]"),
        ((H, W, T, -L), {}, r"loss_weight\[0, 0\] is -1.0"),
        ((H, W, T, L * float("nan")), {}, r"loss_weight\[0, 0\] is nan"),
        ((H, W, T, L), dict(scopes=[[(0, 10)], []]), r"scopes\[1\] is empty"),
        ((H, W, T, L), dict(scopes=[[(0, 10)], [(3, 11)]]), r"scopes\[1\] has \(3, 11\)"),
        ((H, W, T, L), dict(scopes=[[(0, 10)], [(3, 6), (5, 8)]]), r"intervals of scopes\[1\] overlap"),
        (
            (H, W, T, L),
            dict(scopes=[[(0, 10)], [(3, 6)]]),
            r"targets\[0, 1\] \(row 0, stream 1\) is id 0, outside",
        ),
        ((H, W, T, L), dict(stream_embed=W), r"stream_embed must be \[2, 4\]"),
        ((H, W, T, L), dict(bias=W), r"bias must be \[10\]"),
        ((H, W, T, L), dict(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
        ((H, W, T, L), dict(z_loss=-1.0), "z_loss must be 0 or more"),
        ((H, W, T, L), dict(softcap=0.0), "softcap must be above 0"),
        ((H, W, T, L), dict(reduction="mean"), 'reduction must be "sum" or "none"'),
    ],
)
def test_rejects_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sx.ops.multistream_loss(*arguments, **{"scopes": TWO, **options})


def test_result_is_a_tuple_that_engines_can_walk():
    """ZeRO 3 hooks a module's backward through the tensors of its output; it walks tuples, not other classes."""
    scopes, parts, targets, weights = named_case("one_stream")
    out = sx.ops.multistream_loss(parts[0], parts[1], targets, weights, scopes=scopes)
    assert isinstance(out, tuple)
    again = type(out)(*(value if value is None else value + 0 for value in out))
    torch.testing.assert_close(again.loss_sum, out.loss_sum)
    assert [name for name, value in zip(out._fields, out, strict=True) if value is None] == [
        "token_nll",
        "stream_entropy",
    ]
