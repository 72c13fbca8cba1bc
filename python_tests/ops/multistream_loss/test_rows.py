"""Rows planned on the CPU, streams without a vector, and values that nobody checks."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from python_tests.ops.multistream_loss.cases import (
    KINDS,
    OPTIONS,
    SCOPES,
    call,
    formula,
    make_case,
    named_case,
    named_formula,
)
from speechlm_ext.ops import LossRows, OpError, plan_loss_rows


def plan(sets, weights, kinds, separate=False):
    one = len(sets) == 1
    heads = "separate" if separate else "shared"
    return plan_loss_rows(
        weights, scopes=sets[0] if one else sets, row_scope=None if one else kinds, heads=heads
    )


def results(parts, out):
    return [out.loss_sum, *out[1:5], *torch.autograd.grad(out.loss_sum, [p for p in parts if p is not None])]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("live", [0.0, 0.3, 1.0])
def test_planned_rows_change_no_bit(live, separate):
    parts, targets, weights, kinds = make_case(KINDS, 30, separate, live=live)
    want = results(parts, call(parts, targets, weights, KINDS, kinds, separate))
    rows = plan(KINDS, weights, kinds, separate)
    got = results(parts, call(parts, targets, weights, KINDS, kinds, separate, rows=rows, check_values=False))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    total, _, _ = formula(parts, targets, weights, KINDS, kinds, separate)
    torch.testing.assert_close(got[0], total)


@pytest.mark.parametrize("name", SCOPES)
def test_planned_rows_are_those_with_a_target(name):
    scopes, _, _, weights = named_case(name, num_rows=40)
    rows = plan([scopes], weights, None)
    live = (weights > 0).any(1).nonzero().squeeze(1)
    assert set(rows.index.tolist()) == set(live.tolist())
    assert sum(rows.counts) == len(rows.index) and rows.num_rows == 40


def test_rows_of_another_batch_make_the_loss_nan():
    """Whether they leave out a target, or compute one twice."""
    sets = [SCOPES["full_and_own"][1]]
    parts, targets, weights, kinds = make_case(sets, 30, False, vocab=20)
    rows = plan(sets, weights, kinds)
    left_out = weights.clone()
    left_out[rows.index[3]] = 0
    twice = LossRows(
        torch.cat((rows.index, rows.index[:1])), (*rows.counts[:-1], rows.counts[-1] + 1), 30, rows.scopes
    )
    for wrong in (plan(sets, left_out, kinds), twice):
        out = call(parts, targets, weights, sets, kinds, False, rows=wrong)
        assert out.loss_sum.isnan()
    assert call(parts, targets, weights, sets, kinds, False, rows=rows).loss_sum.isfinite()


def test_rows_of_other_kinds_make_the_loss_nan():
    """The same targets, some of which now belong to a scope of another kind that has them too."""
    parts, targets, weights, kinds = make_case(KINDS, 30, False, live=0.8)
    rows = plan(KINDS, weights, kinds)
    assert call(
        parts, targets, weights, KINDS, kinds, False, rows=rows, check_values=False
    ).loss_sum.isfinite()
    num_finite = 0
    for row in (weights > 0).any(dim=1).nonzero().squeeze(1).tolist():
        other = kinds.clone()
        other[row] = 2  # has all ids
        if kinds[row] == 2:
            continue
        wrong = call(parts, targets, weights, KINDS, other, False, rows=rows, check_values=False)
        assert wrong.loss_sum.isnan()
        assert wrong.stream_loss.isnan().tolist() == (weights[row] > 0).tolist()
        num_finite += int(call(parts, targets, weights, KINDS, other, False).loss_sum.isfinite())
    assert num_finite > 5


def test_a_target_outside_its_scope_makes_the_loss_nan_where_nobody_checks():
    sets = [SCOPES["full_and_own"][1]]
    parts, targets, weights, kinds = make_case(sets, 12, False, vocab=20, live=1.0)
    targets[5, 1] = 19
    out = call(parts, targets, weights, sets, kinds, False, check_values=False)
    assert out.stream_loss.isnan().tolist() == [False, True, False]
    with pytest.raises(OpError, match=r"targets\[5, 1\] \(row 5, stream 1\) is id 19"):
        call(parts, targets, weights, sets, kinds, False)


def test_rows_that_cannot_fit_are_refused():
    sets = [SCOPES["full_and_own"][1]]
    parts, targets, weights, kinds = make_case(sets, 12, False, vocab=20)
    for wrong in (plan(sets, weights[:-1], None), plan([SCOPES["full_and_codec"][1]], weights, None)):
        with pytest.raises(OpError, match="Plan them from this batch"):
            call(parts, targets, weights, sets, kinds, False, rows=wrong)
    with pytest.raises(OpError, match="rows must be on cpu like targets"):
        meta = plan(sets, weights, None).to("meta")
        call(parts, targets, weights, sets, kinds, False, rows=meta)
    for arguments, message in (
        (dict(loss_weight=weights.to("meta"), scopes=sets[0]), r"loss_weight must be \[N, 3\] on the CPU"),
        (dict(loss_weight=weights[:, :2], scopes=sets[0]), r"loss_weight must be \[N, 3\]"),
        (dict(loss_weight=weights, scopes=KINDS), "3 kinds of rows need a row_scope"),
        (dict(loss_weight=weights, scopes=KINDS, row_scope=kinds[:3]), "3 kinds of rows need a row_scope"),
        (dict(loss_weight=weights, scopes=sets[0], row_scope=kinds), "1 kinds of rows need a row_scope"),
    ):
        with pytest.raises(OpError, match=message):
            plan_loss_rows(**arguments)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SCOPES)
def test_stream_0_without_a_vector(name, options, with_bias):
    """The same as a vector of zeros, which gets no gradient."""
    scopes, parts, targets, weights = named_case(name, num_rows=17)
    hidden, weight, embed, bias = parts
    rest = embed[1:].detach().requires_grad_()
    parts = [hidden, weight, rest, *([bias] if with_bias else [])]
    out = sx.ops.multistream_loss(
        hidden, weight, targets, weights, scopes=scopes, stream_embed=rest, bias=bias if with_bias else None,
        **OPTIONS[options],
    )  # fmt: skip
    padded = torch.cat((torch.zeros_like(embed[:1]), rest))
    want, _ = named_formula(
        scopes, [hidden, weight, padded, bias if with_bias else None], targets, weights, **OPTIONS[options]
    )
    torch.testing.assert_close(out.loss_sum, want)
    assert torch.equal(out.stream_count, (weights > 0).sum(0))
    for got, exact in zip(
        torch.autograd.grad(out.loss_sum, parts), torch.autograd.grad(want, parts), strict=True
    ):
        torch.testing.assert_close(got, exact)


def test_compiled_with_planned_rows():
    scopes, parts, targets, weights = named_case("full_and_own", dtype=torch.float32)
    rows = plan([scopes], weights, None)

    def loss(hidden, weight):
        return sx.ops.multistream_loss(hidden, weight, targets, weights, scopes=scopes, rows=rows).loss_sum

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*parts[:2])
    torch.testing.assert_close(got, loss(*parts[:2]))
