"""multistream_loss's row kernel and its op: bits, errors against float64, broken rows, opcheck, compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import speechlm_ext as sx
from python_tests.ops.multistream_loss.cases import OPTIONS, SCOPES, named_case
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.multistream_loss import chunks as internals
from speechlm_ext.ops.multistream_loss.reference import loss_pass
from speechlm_ext.ops.multistream_loss.scopes import flatten, read_scopes
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossWants


def large_case(dtype=torch.float32, num_rows=700):
    """Wide enough for every vector loop and its rest, with text rows, speech rows and rows of a few live streams."""
    generator = torch.Generator().manual_seed(3)
    vocab, width = 517, 24
    scopes = [[(0, 517)], [(100, 300)], [(100, 300)], [(300, 401), (440, 441)]]
    parts = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((num_rows, width), (vocab, width), (4, width), (vocab,))
    ]
    targets = torch.stack(
        [
            torch.randint(a, b, (num_rows,), generator=generator)
            for a, b in ((0, 517), (100, 300), (100, 300), (300, 401))
        ],
        dim=1,
    )
    weights = torch.rand(num_rows, 4, generator=generator)
    weights[::2, 1:] = 0
    weights[5::50] = 0
    weights[7::50, :3] = 0
    return scopes, parts, targets, weights


def run_large(case, **options):
    scopes, parts, targets, weights = case
    hidden, weight, embed, bias = parts
    out = sx.ops.multistream_loss(
        hidden, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias, **options
    )
    return out, torch.autograd.grad(out.loss_sum, parts)


@pytest.mark.parametrize("options", OPTIONS)
def test_same_bits_for_every_instruction_set(options):
    case = large_case()
    before = torch.get_num_threads()
    results = []
    try:
        torch.set_num_threads(1)
        for simd in native.simd_available():
            native.use_simd(simd)
            for _ in range(2):
                results.append(run_large(case, **OPTIONS[options]))
    finally:
        native.use_simd("")
        torch.set_num_threads(before)
    (first, first_grads), *rest = results
    for out, grads in rest:
        for got, want in zip((*out[:5], *grads), (*first[:5], *first_grads), strict=True):
            assert torch.equal(got, want)


def test_row_kernel_gives_the_same_bits_for_every_number_of_threads():
    logits = torch.randn(300, 517, generator=torch.Generator().manual_seed(0))
    _, _, targets, weights = large_case(num_rows=300)
    streams = [
        (0, True, True, [(0, 0, 517)]),
        (1, True, True, [(100, 100, 200)]),
        (3, True, True, [(300, 300, 101), (440, 440, 1)]),
    ]
    bias = torch.randn(3, 517)
    results = []
    for threads in (1, 2, 3, 7):
        z, token_nll, entropy = logits.clone(), torch.zeros(300, 4), torch.zeros(300, 4)
        loss, correct = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
        count, sums = torch.zeros(4, dtype=torch.int64), torch.zeros(3, 517)
        native.multistream_loss_rows(
            z, torch.arange(300), targets, weights > 0, weights, None, bias, streams, 0.1, 0.1, 0.0, True, token_nll,
            entropy, loss, correct, count, sums, threads,
        )  # fmt: skip
        results.append((z, token_nll, entropy, loss, correct, count, sums))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("num_rows", "width", "vocab"),
    [(512, 24, 13_192), (5, 576, 1000), (64, 24, 100), (17, 63, 20), (333, 63, 5001), (700, 200, 300)],
)
def test_same_bits_for_every_number_of_threads(num_rows, width, vocab):
    """Loss and all gradients, at sizes where torch's own products differ by the number of threads."""
    generator = torch.Generator().manual_seed(0)
    low, high = vocab // 4, vocab // 2
    parts = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((num_rows, width), (vocab, width), (3, width), (vocab,))
    ]
    targets = torch.randint(low, high, (num_rows, 3), generator=generator)
    weights = torch.rand(num_rows, 3, generator=generator)
    scopes = [[(0, vocab)], [(low, high)], [(low, high)]]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out, gradients = run_large((scopes, parts, targets, weights), z_loss=0.1)
            results.append((out.loss_sum, out.stream_loss, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_a_task_that_fails_is_reported_and_the_team_goes_on():
    done = []

    def fail():
        raise ValueError("a bad tile")

    for threads in (1, 2, 3):
        with pytest.raises(ValueError, match="a bad tile"):
            native.run_tasks([fail], threads, threads == 3)
        done.clear()
        native.run_tasks([lambda i=i: done.append(i) for i in range(50)], threads)
        assert sorted(done) == list(range(50))
    native.run_tasks([], 2)


def error(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_error_is_no_worse_than_twice_that_of_torch(options, dtype):
    """Against float64: twice the error of the plain torch formula in float32, on the same inputs."""
    scopes, parts, targets, weights = large_case(dtype)
    wide = [p.detach().double().requires_grad_() for p in parts]
    plain = [p.detach().float().requires_grad_() for p in parts]

    def formula(hidden, weight, embed, bias):
        total = hidden.sum() * 0
        for s, scope in enumerate(scopes):
            ids = torch.cat([torch.arange(a, b) for a, b in scope])
            live = weights[:, s] > 0
            logits = (hidden[live] + embed[s]) @ weight[ids].T + bias[ids]
            cap = OPTIONS[options].get("softcap")
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            target = torch.searchsorted(ids, targets[live, s])
            ls, zl = OPTIONS[options].get("label_smoothing", 0.0), OPTIONS[options].get("z_loss", 0.0)
            loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=ls)
            loss = loss + zl * logits.logsumexp(1) ** 2
            total = total + (loss * weights[live, s]).sum()
        return total

    want = formula(*wide)
    want_grads = torch.autograd.grad(want, wide)
    torch_loss = formula(*plain)
    torch_grads = torch.autograd.grad(torch_loss, plain)
    out, grads = run_large((scopes, parts, targets, weights), **OPTIONS[options])
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert error(out.loss_sum, want) <= max(2 * error(torch_loss, want), 2e-7)
    for got, theirs, exact in zip(grads, torch_grads, want_grads, strict=True):
        assert error(got, exact) <= 2 * error(theirs, exact) + rounding


def test_going_back_twice_gives_the_same_gradients():
    case = large_case(num_rows=60)
    scopes, parts, targets, weights = case
    hidden, weight, embed, bias = parts
    out = sx.ops.multistream_loss(
        hidden, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias
    )
    first = torch.autograd.grad(out.loss_sum * 0.3, parts, retain_graph=True)
    second = torch.autograd.grad(out.loss_sum * 0.6, parts)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_breaks_the_loss_and_no_other_row(bad):
    scopes, parts, targets, weights = large_case(num_rows=40)
    hidden, weight, embed, bias = (p.detach() for p in parts)
    weights = torch.ones_like(weights)
    call = dict(scopes=scopes, stream_embed=embed, bias=bias, reduction="none")
    want = sx.ops.multistream_loss(hidden, weight, targets, weights, **call)
    hidden = hidden.clone()
    hidden[7, 3] = bad
    got = sx.ops.multistream_loss(hidden, weight, targets, weights, **call)
    assert got.loss_sum.isnan() and got.token_nll[7].isnan().all()
    others = torch.arange(40) != 7
    assert torch.equal(got.token_nll[others], want.token_nll[others])


def test_opcheck_and_compile():
    scopes, parts, targets, weights = large_case(num_rows=20)
    hidden, weight, embed, bias = (p.detach() for p in parts)
    embed = embed.T.contiguous().T  # gradients are contiguous whatever their inputs are
    flat = flatten(read_scopes([scopes, scopes[:1] + scopes[2:] + scopes[1:2]], 517, False)[0])
    row_scope = torch.zeros(20, dtype=torch.int64)
    for wants, want_tokens in (([True] * 4, False), ([False, True, True, False], False), ([False] * 4, True)):
        torch.library.opcheck(
            torch.ops.speechlm_ext.multistream_loss.default,
            (hidden, weight, targets, weights > 0, weights, flat, None, row_scope, embed, bias, 0.1, 0.1, 3.0, None, [],
             False, wants,             want_tokens, want_tokens, 0, True),
        )  # fmt: skip

    def step(hidden, weight, embed, bias):
        out = sx.ops.multistream_loss(
            hidden * 2, weight, targets, weights, scopes=scopes, stream_embed=embed, bias=bias
        )
        return out.loss_sum * 3 + 0 * out.stream_loss.sum(), out.stream_correct

    want, want_correct = step(*parts)
    got, got_correct = torch.compile(step, fullgraph=True, backend="aot_eager")(*parts)
    torch.testing.assert_close(got, want)
    assert torch.equal(got_correct, want_correct)
    for a, b in zip(torch.autograd.grad(got, parts), torch.autograd.grad(want, parts), strict=True):
        torch.testing.assert_close(a, b)


def test_native_layer_checks_for_itself():
    logits, targets = torch.zeros(3, 5), torch.zeros(4, 2, dtype=torch.int64)
    good = dict(
        rows=torch.arange(3), live=targets > 0, coef=torch.ones(4, 2), streams=[(0, False, True, [(0, 0, 5)])]
    )

    def call(logits=logits, sums=torch.zeros(1, 5), loss=torch.zeros(2, dtype=torch.float64), **changed):  # noqa: B008
        given = {**good, **changed}
        native.multistream_loss_rows(
            logits, given["rows"], targets, given["live"], given["coef"], None, None, given["streams"], 0.0, 0.0, 0.0,
            True, None, None, loss, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), sums, 1,
        )  # fmt: skip

    call()
    for changed, message in (
        (dict(rows=torch.tensor([0, 1, 4])), r"rows\[2\] is 4; targets has 4 rows"),
        (dict(rows=torch.tensor([-1, 1, 2])), r"rows\[0\] is -1"),
        (dict(streams=[(2, False, True, [(0, 0, 5)])]), "stream 2 of 2"),
        (dict(streams=[(0, False, True, [(0, 1, 5)])]), "columns 1 to 6 of 5"),
        (dict(streams=[(0, False, True, [(0, 0, 0)])]), "columns 0 to 0 of 5"),
        (dict(streams=[(0, False, True, [])]), "scope of stream 0 is empty"),
        (dict(streams=[]), "serves 1 to 64 streams; got 0"),
        (dict(coef=torch.ones(4, 2).double()), "coef must be float32"),
        (dict(live=torch.ones(4, 2)), "live must be bool"),
        (dict(sums=torch.zeros(1, 4)), "column_sums must have size 5 in dimension 1"),
        (
            dict(streams=[(0, True, True, [(0, 0, 5)])]),
            "bias must be given if streams have a row of it; 1 have one",
        ),
        (dict(logits=torch.zeros(5, 3).T), "logits must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SCOPES)
def test_reference_pass_agrees(name, options):
    """The plain torch pass, with which the row kernel shares no line, gives what the row kernel gives."""
    scopes, parts, targets, weights = named_case(name)
    hidden, weight, embed, bias = (p.detach() for p in parts)
    sets, _ = read_scopes([scopes], weight.shape[0], False)
    inputs = LossInputs(
        hidden, weight, targets, weights > 0, weights, flatten(sets), coef_nll=weights * 0.5, stream_embed=embed,
        bias=bias, **OPTIONS[options],
    )  # fmt: skip
    wants = LossWants([True] * 4, token_nll=True, token_entropy=True)
    want = vars(loss_pass(inputs, wants))
    for name, got in vars(internals.loss_pass(inputs, wants)).items():
        torch.testing.assert_close(got, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.cuda
@pytest.mark.parametrize("adds_in_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_on_a_gpu(dtype, adds_in_float32, monkeypatch):
    """Several chunks and a second product: at most twice the error of torch's formula in the same dtype."""
    from speechlm_ext.ops.common import matmul as products

    if adds_in_float32 and not products._ADDS_IN_FLOAT32:
        pytest.skip("this torch cannot add a product of 16-bit matrices to float32")
    monkeypatch.setattr(products, "_ADDS_IN_FLOAT32", adds_in_float32)
    monkeypatch.setattr(internals, "MIN_ROWS", 100)
    _, parts, targets, weights = large_case(dtype)
    scopes = [[(0, 480)], [(100, 300)], [(100, 300)], [(300, 401), (440, 500)]]
    targets[:, 0] %= 480

    def formula(hidden, weight, embed, bias):
        total = 0
        for s, scope in enumerate(scopes):
            ids = torch.cat([torch.arange(a, b) for a, b in scope]).to(hidden.device)
            live = weights[:, s] > 0
            logits = (hidden[live.to(hidden.device)] + embed[s]) @ weight[ids].T + bias[ids]
            target = torch.searchsorted(ids, targets[live, s].to(hidden.device))
            loss = F.cross_entropy(
                logits.float() if logits.dtype == dtype else logits, target, reduction="none"
            )
            total = total + (loss * weights[live, s].to(hidden.device)).sum()
        return total

    wide = [p.detach().double().requires_grad_() for p in parts]
    there = [p.detach().cuda().requires_grad_() for p in parts]
    want = torch.autograd.grad(formula(*wide), wide)
    theirs = torch.autograd.grad(formula(*there), there)
    hidden, weight, embed, bias = there
    out = sx.ops.multistream_loss(
        hidden,
        weight,
        targets.cuda(),
        weights.cuda(),
        scopes=scopes,
        stream_embed=embed,
        bias=bias,
        chunk_bytes=1,
    )
    for got, other, exact in zip(torch.autograd.grad(out.loss_sum, there), theirs, want, strict=True):
        assert error(got.cpu(), exact) <= 2 * error(other.cpu(), exact)
