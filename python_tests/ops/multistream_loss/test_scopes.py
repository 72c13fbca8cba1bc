"""multistream_loss with a scope per kind of row, separate heads, entropy, recomputation, and its twin for scoring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechlm_ext as sx
from python_tests.ops.multistream_loss.cases import KINDS, VOCAB, D, call, formula, make_case
from speechlm_ext.ops.multistream_loss import chunks as internals
from speechlm_ext.ops.multistream_loss.reference import loss_pass
from speechlm_ext.ops.multistream_loss.scopes import flatten, read_scopes
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossWants

ALL = LossWants([True] * 4, token_nll=True, token_entropy=True)


def compare(device, parts, targets, weights, sets, kinds, separate, **options):
    """Every way to call the op on a device against the formula on the CPU, whose logprobs and entropies it gives."""
    want, logprobs, entropies = formula(parts, targets, weights, sets, kinds, separate, **options)
    given_parts = [p for p in parts if p is not None]
    want_grads = torch.autograd.grad(want, given_parts)
    parts = [None if p is None else p.detach().to(device).requires_grad_() for p in parts]
    given_parts = [p for p in parts if p is not None]
    targets, weights, kinds = targets.to(device), weights.to(device), kinds.to(device)
    for extra in ({}, dict(recompute=True), dict(reduction="none", entropy=True)):
        out = call(parts, targets, weights, sets, kinds, separate, **options, **extra)
        torch.testing.assert_close(out.loss_sum.cpu(), want)
        for got, expected in zip(torch.autograd.grad(out.loss_sum, given_parts), want_grads, strict=True):
            torch.testing.assert_close(got.cpu(), expected)
    torch.testing.assert_close(out.token_nll.cpu(), -logprobs)
    torch.testing.assert_close(out.stream_entropy.cpu(), entropies.sum(0))
    return logprobs, entropies


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("options", [{}, dict(z_loss=0.1, label_smoothing=0.2, softcap=3.0)])
@pytest.mark.parametrize("sets", [KINDS, KINDS[:1], KINDS[2:]], ids=["kinds", "one", "shared codes"])
def test_matches_float64_formula(sets, options, separate, device):
    case = make_case(sets, 17, separate)
    logprobs, entropies = compare(device, *case[:3], sets, case[3], separate, **options)
    (hidden, weight, embed, bias), targets, weights, kinds = (
        [p.to(device) for p in case[0]],
        *(t.to(device) for t in case[1:]),
    )
    single = len(sets) == 1
    got, got_entropy = sx.ops.multistream_logprobs(
        hidden, weight, targets.int(), weights > 0, scopes=sets[0] if single else sets,
        row_scope=None if single else kinds.int(), heads="separate" if separate else "shared", stream_embed=embed,
        bias=bias, softcap=options.get("softcap"),
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), logprobs)
    torch.testing.assert_close(got_entropy.cpu(), entropies)
    assert not got.requires_grad and not got_entropy.requires_grad


@st.composite
def cases(draw):
    """Any sizes, scopes, kinds, weights and chunks."""
    num_streams, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 25, 70]))

    def scope():
        borders = sorted(draw(st.sets(st.integers(0, vocab), min_size=2, max_size=6)))
        pairs = list(zip(borders[::2], borders[1::2], strict=False))
        return draw(st.permutations(pairs))

    sets = [[scope() for _ in range(num_streams)] for _ in range(draw(st.integers(1, 3)))]
    separate = draw(st.booleans())
    case = make_case(
        sets,
        draw(st.sampled_from([0, 1, 2, 7, 30])),
        separate,
        with_embed=draw(st.booleans()),
        with_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        live=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        vocab=vocab,
        width=draw(st.sampled_from([1, 3, 16, 17])),
    )
    chunk = draw(st.sampled_from([1, 2, 3, 8, 512]))
    options = draw(st.sampled_from([{}, dict(z_loss=0.05), dict(label_smoothing=0.3), dict(softcap=2.0)]))
    return sets, separate, case, chunk, options


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_scopes_weights_and_chunks(case):
    sets, separate, (parts, targets, weights, kinds), chunk, options = case
    before = internals.MIN_ROWS
    try:
        internals.MIN_ROWS = chunk
        want = formula(parts, targets, weights, sets, kinds, separate, **options)[0]
        out = call(parts, targets, weights, sets, kinds, separate, chunk_bytes=1, **options)
    finally:
        internals.MIN_ROWS = before
    torch.testing.assert_close(out.loss_sum, want)
    assert torch.equal(out.stream_count, (weights > 0).sum(0))
    torch.testing.assert_close(out.stream_weight, weights.sum(0).float())
    given_parts = [p for p in parts if p is not None]
    for got, expected in zip(
        torch.autograd.grad(out.loss_sum, given_parts), torch.autograd.grad(want, given_parts), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("separate", [False, True])
def test_reference_pass_agrees(separate):
    (hidden, weight, embed, bias), targets, weights, kinds = make_case(KINDS, 40, separate)
    sets, _ = read_scopes(KINDS, None if separate else VOCAB, separate)
    inputs = LossInputs(
        hidden.detach(), weight.detach(), targets, weights > 0, weights, flatten(sets), coef_nll=weights * 0.5,
        row_scope=kinds, stream_embed=embed.detach(), bias=bias.detach(), z_loss=0.1, label_smoothing=0.1, softcap=4.0,
    )  # fmt: skip
    want = vars(loss_pass(inputs, ALL))
    for name, got in vars(internals.loss_pass(inputs, ALL)).items():
        torch.testing.assert_close(got, want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck_with_kinds_and_separate_heads():
    parts, targets, weights, kinds = make_case(KINDS, 6, True, live=0.8)
    assert torch.autograd.gradcheck(
        lambda *p: call(p, targets, weights, KINDS, kinds, True, z_loss=0.1, label_smoothing=0.1).loss_sum,
        parts,
    )
    assert torch.autograd.gradcheck(
        lambda *p: call(p, targets, weights, KINDS, kinds, True, reduction="none").token_nll, parts
    )


def test_recompute_holds_no_gradients_between_forward_and_backward():
    parts, targets, weights, kinds = make_case(KINDS, 20, False)
    held = {}
    for recompute in (False, True):
        out = call(parts, targets, weights, KINDS, kinds, False, recompute=recompute)
        node = out.loss_sum.grad_fn
        held[recompute] = node.gradients
    assert held[True] is None and len(held[False]) == 4


def test_logprobs_of_all_targets_and_without_any():
    (hidden, weight, embed, bias), targets, _, _ = make_case(KINDS[:1], 9, False)
    everything = torch.ones_like(targets, dtype=torch.float64)
    kinds = torch.zeros(9, dtype=torch.int64)
    _, want, want_entropy = formula(
        (hidden, weight, None, None), targets, everything, KINDS[:1], kinds, False
    )
    got, entropy = sx.ops.multistream_logprobs(hidden, weight, targets, scopes=KINDS[0])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(entropy, want_entropy)
    none, none_entropy = sx.ops.multistream_logprobs(
        hidden, weight, targets * 100, torch.zeros_like(targets, dtype=torch.bool), scopes=KINDS[0]
    )
    assert not none.any() and not none_entropy.any()


def test_entropy_with_forbidden_ids():
    """An id whose bias is minus infinity has probability 0, and adds nothing to the entropy."""
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    bias = torch.tensor([0, 0, -float("inf"), 0, 0])
    out, entropy = sx.ops.multistream_logprobs(
        hidden, weight, torch.tensor([[0], [1], [4]]), scopes=[[(0, 5)]], bias=bias
    )
    kept = [0, 1, 3, 4]
    log_p = (hidden @ weight[kept].T).log_softmax(1)
    torch.testing.assert_close(entropy[:, 0], -(log_p.exp() * log_p).sum(1))
    torch.testing.assert_close(out[:, 0], log_p[[0, 1, 2], [0, 1, 3]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(row_scope=torch.tensor([0, 3])), r"row_scope\[1\] is 3; it must be 0 to 2"),
        (dict(row_scope=torch.tensor([-1, 0])), r"row_scope\[0\] is -1; it must be 0 to 2"),
        (dict(row_scope=torch.tensor([0.0, 1.0])), r"row_scope must be int32 or int64 \[2\]; got float32 \[2\]"),
        (dict(row_scope=torch.zeros(3, dtype=torch.int64)), r"row_scope must be int32 or int64 \[2\]; got"),
        (dict(row_scope=None), r"scopes has 3 kinds of rows; row_scope \[N\] must give"),
        (dict(scopes=[KINDS[0], KINDS[1][:2]]), r"scopes\[1\] must hold one scope per stream \(3\); got 2"),
        (dict(scopes=[KINDS[0], [[(0, 4)], [], [(1, 2)]]]), r"scopes\[1\]\[1\] is empty"),
        (dict(scopes=[[], []]), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes=7), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes=[[(0, 5, 7)]] * 3), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes="own"), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes=[[(0.5, 5)]] * 3), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes=[[(0, 5)], 7, [(0, 5)]]), "scopes must hold, for each stream, a list of intervals"),
        (dict(scopes=[[(0, 5)]] * 65, row_scope=None), "at most 64 streams; got scopes of 65"),
        (dict(softcap=float("inf")), "softcap must be above 0 and finite; got inf"),
        (dict(z_loss=float("inf")), "z_loss must be 0 or more and finite; got inf"),
        (dict(chunk_bytes=1e6), "chunk_bytes must be an int above 0; got 1000000.0"),
        (dict(heads="own"), "heads must be .shared. or .separate.; got 'own'"),
        (dict(heads="separate"), "weight must have 31 rows, one for each id of each stream's scope; got 25"),
        (dict(chunk_bytes=0), "chunk_bytes must be an int above 0; got 0"),
        (
            dict(row_scope=torch.tensor([0, 1])),
            r"targets\[1, 0\] \(row 1, stream 0\) is id 5, outside .* scope \[\(0, 4\), \(16, 25\)\]",
        ),
    ],
)  # fmt: skip
def test_rejects_bad_input(changed, message):
    arguments = {**dict(scopes=KINDS, row_scope=torch.tensor([0, 2])), **changed}
    targets = torch.tensor([[5, 10, 13], [5, 10, 13]])
    with pytest.raises(ValueError, match=message):
        sx.ops.multistream_loss(
            torch.randn(2, D), torch.randn(VOCAB, D), targets, torch.ones(2, 3), **arguments
        )


def test_logprobs_rejects_a_mask_that_is_none():
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 3\] like targets; got float32 \[2, 3\]"):
        sx.ops.multistream_logprobs(
            torch.randn(2, D), torch.randn(VOCAB, D), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3),
            scopes=KINDS[0],
        )  # fmt: skip


def test_inference_mode_on_several_threads():
    """The mode is a thread's own, and the products run on others."""
    hidden, weight = torch.randn(300, 64), torch.randn(3000, 64)
    targets = torch.randint(0, 3000, (300, 1))
    want, _ = sx.ops.multistream_logprobs(hidden, weight, targets, scopes=[[(0, 3000)]])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            got, _ = sx.ops.multistream_logprobs(hidden, weight, targets, scopes=[[(0, 3000)]])
            loss = sx.ops.multistream_loss(
                hidden, weight, targets, torch.ones(300, 1), scopes=[[(0, 3000)]], stream_embed=hidden[:1]
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, want) and loss.loss_sum.isfinite()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learnt", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_what_is_frozen_costs_no_gradient(learnt, recompute):
    parts, targets, weights, kinds = make_case(KINDS, 30, True)
    want = torch.autograd.grad(formula(parts, targets, weights, KINDS, kinds, True)[0], parts)
    parts = [p.detach().requires_grad_(i in learnt) for i, p in enumerate(parts)]
    out = call(parts, targets, weights, KINDS, kinds, True, recompute=recompute)
    if not recompute:
        assert len(out.loss_sum.grad_fn.gradients) == len(learnt)
    out.loss_sum.backward()
    for i, (part, expected) in enumerate(zip(parts, want, strict=True)):
        if i in learnt:
            torch.testing.assert_close(part.grad, expected)
        else:
            assert part.grad is None


def test_compiles_with_sizes_that_change():
    def loss(hidden, weight, targets, weights, kinds):
        return sx.ops.multistream_loss(
            hidden * 1, weight, targets, weights, scopes=KINDS, row_scope=kinds, z_loss=0.1
        ).loss_sum

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (5, 9):
        (hidden, weight, _, _), targets, weights, kinds = make_case(KINDS, num_rows, False)
        torch.testing.assert_close(
            compiled(hidden, weight, targets, weights, kinds), loss(hidden, weight, targets, weights, kinds)
        )


def test_rows_of_separate_heads():
    assert sx.ops.separate_head_rows(KINDS) == 19 + 6 + 6
    assert sx.ops.separate_head_rows(KINDS[0]) == 10 + 3 + 3
