"""multistream_loss's row kernels alone, on every device, against a formula in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from python_tests import cuda_on_cpu
from speechlm_ext.ops.multistream_loss.row_kernel import RowOutputs, loss_rows
from speechlm_ext.ops.multistream_loss.types import LossInputs

FIRST_ID = 1000  # column 0 holds this id, so that a kernel that takes one for the other is found

#: Columns of the chunk, and each stream's slices (begin, end).
SCOPES = {
    "one": (37, [[(0, 37)]]),
    "one_column": (1, [[(0, 1)], [(0, 1)]]),
    "full_and_codec": (131, [[(0, 131)], *[[(50, 115)]] * 8]),
    "own": (90, [[(0, 30)], [(30, 61)], [(61, 90)]]),
    "odd_borders": (301, [[(3, 40), (129, 258)], [(0, 301)], [(41, 42), (127, 130), (259, 300)]]),
    "twenty": (41, [*[[(5, 29)]] * 18, [(0, 41)], [(0, 41)]]),
    "sixty_four": (70, [[(s % 3, 20 + s % 7), (30, 31 + s % 2), (33, 70)] for s in range(64)]),
    "wide": (4311, [[(0, 4311)], [(1, 4310)], [(1, 4310)]]),
}
OPTIONS = {
    "plain": {},
    "z_loss": dict(z_loss=0.1),
    "smoothing": dict(label_smoothing=0.2),
    "softcap": dict(softcap=3.0),
    "all": dict(z_loss=0.05, label_smoothing=0.1, softcap=5.0),
}
SMALL = (torch.bfloat16, torch.float16)


@dataclass
class Case:
    """The arguments of the kernel, on the CPU."""

    z: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    live: torch.Tensor
    coef: torch.Tensor
    coef_nll: torch.Tensor | None
    bias: torch.Tensor | None
    scopes: list[list[tuple[int, int]]]

    @property
    def streams(self):
        return [
            (s, self.bias is not None, s != 1, [(FIRST_ID + a, a, b - a) for a, b in slices])
            for s, slices in enumerate(self.scopes)
        ]

    def columns(self, s):
        return torch.cat([torch.arange(a, b) for a, b in self.scopes[s]])


def make_case(name, dtype=torch.float32, live="random", num_rows=21, bias=True, coef_nll=True):
    generator = torch.Generator().manual_seed(7)
    random = partial(torch.rand, generator=generator, dtype=torch.float64)
    num_columns, scopes = SCOPES[name]
    N, S = num_rows + 5, len(scopes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64) * 3
    case = Case(
        z.to(dtype),
        torch.randperm(N, generator=generator)[:num_rows],
        torch.full((N, S), -(1 << 60)),
        torch.zeros(N, S, dtype=torch.bool),
        random(N, S).to(wide),
        (random(N, S) - 0.5).to(wide) if coef_nll else None,
        torch.randn(S, num_columns, generator=generator, dtype=torch.float64).to(wide) if bias else None,
        scopes,
    )
    pattern = random(N, S)
    case.live[:] = {
        "none": pattern > 2,
        "one": pattern == pattern.amax(dim=1, keepdim=True),
        "all": pattern >= 0,
        "random": (pattern > 0.4) & (random(N, 1) > 0.2),
    }[live]
    for s in range(S):
        columns = case.columns(s)
        chosen = columns[torch.randint(len(columns), (N,), generator=generator)]
        case.targets[:, s] = torch.where(case.live[:, s], FIRST_ID + chosen, case.targets[:, s])
    return case


@dataclass
class Result:
    grad: torch.Tensor
    token_nll: torch.Tensor
    token_entropy: torch.Tensor
    stream_loss: torch.Tensor
    stream_correct: torch.Tensor
    stream_count: torch.Tensor
    column_sums: torch.Tensor

    def equals(self, other):
        return all(torch.equal(a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))


def run(case, options, device=torch.device("cpu"), want_grad=True, entropy=True):  # noqa: B008
    """The kernel; it adds to sums that are 1 before, and leaves tokens that are not live at 7."""
    wide, (N, S) = case.coef.dtype, case.live.shape
    num_sums = sum(s != 1 for s in range(S))
    out = Result(
        case.z.clone(),
        torch.full((N, S), 7.0, dtype=wide),
        torch.full((N, S), 7.0, dtype=wide),
        torch.ones(S, dtype=torch.float64),
        torch.ones(S, dtype=torch.int64),
        torch.ones(S, dtype=torch.int64),
        torch.ones(num_sums, case.z.shape[1], dtype=wide),
    )
    out = Result(*(tensor.to(device) for tensor in vars(out).values()))

    fields = dict(targets=case.targets, live=case.live, coef_loss=case.coef, coef_nll=case.coef_nll)
    fields = {name: None if x is None else x.to(device) for name, x in fields.items()}
    loss_rows(
        out.grad,
        case.rows.to(device),
        LossInputs(hidden=out.grad, weight=out.grad, scopes=[], **fields, **options),  # neither is read
        streams=case.streams,
        stream_bias=None if case.bias is None else case.bias.to(device),
        out=RowOutputs(
            stream_loss=out.stream_loss,
            stream_correct=out.stream_correct,
            stream_count=out.stream_count,
            column_sums=out.column_sums if want_grad else None,
            token_nll=out.token_nll,
            token_entropy=out.token_entropy if entropy else None,
        ),
        want_grad=want_grad,
    )
    out = Result(*(tensor.cpu() for tensor in vars(out).values()))
    out.stream_loss -= 1
    out.stream_correct -= 1
    out.stream_count -= 1
    if want_grad:
        out.column_sums -= 1
    return out


def formula(case, options, dtype=torch.float64):
    """The same in plain torch, with arithmetic in ``dtype``."""
    z, wide, (N, S) = case.z.to(dtype), case.coef.dtype, case.live.shape
    out = Result(
        torch.zeros_like(z),
        torch.full((N, S), 7.0, dtype=dtype),
        torch.full((N, S), 7.0, dtype=dtype),
        torch.zeros(S, dtype=torch.float64),
        torch.zeros(S, dtype=torch.int64),
        torch.zeros(S, dtype=torch.int64),
        torch.zeros(0),
    )
    sums = []
    for s in range(S):
        columns = case.columns(s)
        picked = case.live[case.rows, s].nonzero().squeeze(1)
        at = case.rows[picked]
        x = z[picked][:, columns].requires_grad_()
        y = x if case.bias is None else x + case.bias[s, columns].to(dtype)
        cap = options.get("softcap")
        y = y if cap is None else cap * torch.tanh(y / cap)
        log_p = F.log_softmax(y, dim=1)
        target = torch.searchsorted(columns, case.targets[at, s] - FIRST_ID)
        nll = -log_p.gather(1, target[:, None]).squeeze(1)
        ls = options.get("label_smoothing", 0.0)
        loss = (1 - ls) * nll - ls * log_p.mean(dim=1)
        loss = loss + options.get("z_loss", 0.0) * y.logsumexp(dim=1) ** 2
        total = (case.coef[at, s].to(dtype) * loss).sum()
        both = total if case.coef_nll is None else total + (case.coef_nll[at, s].to(dtype) * nll).sum()
        (grad,) = torch.autograd.grad(both, x)
        out.grad[picked[:, None], columns] += grad
        out.token_nll[at, s] = nll.detach()
        out.token_entropy[at, s] = -(log_p.exp() * log_p).sum(dim=1).detach()
        out.stream_loss[s] = total.detach()
        out.stream_correct[s] = (y.gather(1, target[:, None]).squeeze(1) == y.amax(dim=1)).sum()
        if s != 1:
            sums.append(torch.zeros(z.shape[1], dtype=dtype))
            sums[-1][columns] = grad.sum(dim=0)
        out.stream_count[s] = len(picked)
    out.column_sums = torch.stack(sums)
    out.stream_loss = out.stream_loss.to(wide)
    return out


def check_close(got, want, entropy=True):
    """Sums of a few hundred numbers in float32 or float64, in another order; G rounded to the dtype of z."""
    wide = got.token_nll.dtype
    tight = dict(rtol=1e-10, atol=1e-10) if wide == torch.float64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.token_nll, want.token_nll.to(wide), **tight)
    if entropy:
        torch.testing.assert_close(got.token_entropy, want.token_entropy.to(wide), **tight)
    torch.testing.assert_close(got.stream_loss, want.stream_loss.double(), **tight)
    assert torch.equal(got.stream_correct, want.stream_correct)
    assert torch.equal(got.stream_count, want.stream_count)
    torch.testing.assert_close(got.column_sums, want.column_sums.to(wide), **tight)
    eps = torch.finfo(got.grad.dtype).eps
    torch.testing.assert_close(
        got.grad.double(), want.grad, rtol=max(tight["rtol"], eps), atol=max(tight["atol"], eps / 8)
    )


def refused_by_the_cpu(case, request):
    """The CPU kernel takes float32 and float64 only, and says so; True where that was the test."""
    if case.z.dtype not in SMALL or request.node.callspec.params["device"] != "cpu":
        return False
    with pytest.raises(ValueError, match="logits must be float32 or float64; got"):
        run(case, OPTIONS["plain"])
    return True


@pytest.mark.parametrize("live", ["random", "none", "one", "all"])
@pytest.mark.parametrize("name", SCOPES)
def test_every_scope_and_live_pattern(name, live, device):
    case = make_case(name, live=live, num_rows=4 if name in ("wide", "sixty_four") else 21)
    check_close(run(case, OPTIONS["plain"], device), formula(case, OPTIONS["plain"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SMALL])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["full_and_codec", "odd_borders"])
def test_every_option_and_dtype(name, options, dtype, device, request):
    case = make_case(name, dtype)
    if refused_by_the_cpu(case, request):
        return
    got, want = run(case, OPTIONS[options], device), formula(case, OPTIONS[options])
    check_close(got, want)
    if dtype in SMALL:
        rounded = formula(case, OPTIONS[options], dtype)
        for ours, theirs, exact in (
            (got.grad, rounded.grad, want.grad),
            (got.token_nll[case.live], rounded.token_nll[case.live], want.token_nll[case.live]),
        ):
            error, their_error = ((x.double() - exact).norm() for x in (ours, theirs))
            assert error <= 2 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_bias_coef_nll_and_entropy(dtype, device, request):
    case = make_case("wide", dtype, num_rows=3, bias=False, coef_nll=False)
    if refused_by_the_cpu(case, request):
        return
    got = run(case, OPTIONS["plain"], device, entropy=False)
    check_close(got, formula(case, OPTIONS["plain"]), entropy=False)
    assert (got.token_entropy == 7).all()


def test_many_rows(device):
    """More rows than one split of the column sums takes, and a last tile of rows that is not full."""
    case = make_case("odd_borders", num_rows=150)
    check_close(run(case, OPTIONS["all"], device), formula(case, OPTIONS["all"]))


def test_without_gradient_the_logits_stay(device):
    case = make_case("full_and_codec")
    got = run(case, OPTIONS["all"], device, want_grad=False)
    want = run(case, OPTIONS["all"], device)
    assert torch.equal(got.grad, case.z) and (got.column_sums == 1).all()
    for field in ("token_nll", "token_entropy", "stream_loss", "stream_correct"):
        assert torch.equal(getattr(got, field), getattr(want, field))


def test_no_rows(device):
    case = make_case("own", num_rows=1)
    case.z, case.rows = case.z[:0], case.rows[:0]
    got = run(case, OPTIONS["plain"], device)
    assert not got.stream_loss.any() and not got.stream_correct.any() and not got.column_sums.any()


def test_columns_outside_all_scopes_and_rows_without_target_get_zero(device):
    """Also where the logits are no numbers."""
    case = make_case("odd_borders")
    case.scopes = [case.scopes[0], case.scopes[2], case.scopes[0]]
    case.targets[:] = FIRST_ID + 41
    case.targets[:, (0, 2)] = FIRST_ID + 3
    outside = torch.ones(case.z.shape[1], dtype=torch.bool)
    for s in range(3):
        outside[case.columns(s)] = False
    dead = ~case.live[case.rows].any(dim=1)
    assert outside.any() and dead.any()
    clean = run(case, OPTIONS["plain"], device)
    case.z[:, outside] = float("nan")
    case.z[dead] = float("inf")
    got = run(case, OPTIONS["plain"], device)
    assert (got.grad[:, outside] == 0).all() and (got.grad[dead] == 0).all()
    assert got.equals(clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_disturbs_no_other(bad, device):
    case = make_case("full_and_codec", live="all")
    clean = run(case, OPTIONS["all"], device)
    case.z[4, 60] = bad
    for options in (OPTIONS["plain"], dict(z_loss=0.05, label_smoothing=0.1)):
        clean = run(replace(case, z=torch.where(case.z.isfinite(), case.z, 0)), options, device)
        got = run(case, options, device)
        others = torch.arange(len(case.rows)) != 4
        assert got.stream_loss.isnan().all() and got.token_nll[case.rows[4]].isnan().all()
        assert torch.equal(got.grad[others], clean.grad[others])
        rows = case.rows[others]
        assert torch.equal(got.token_nll[rows], clean.token_nll[rows])
        assert torch.equal(got.token_entropy[rows], clean.token_entropy[rows])


def test_masked_logits_and_large_ones(device):
    """-inf is a probability of zero, and no logit is too large for a difference."""
    case = make_case("full_and_codec", live="all", bias=False)
    case.z *= 1e4
    masked = case.z.clone()
    masked[:, 70:80] = float("-inf")
    case.targets[:, :] = FIRST_ID + 60
    got = run(replace(case, z=masked), OPTIONS["plain"], device)
    want = formula(replace(case, z=masked.clamp(min=-1e9)), OPTIONS["plain"])
    torch.testing.assert_close(got.token_nll, want.token_nll.float())
    torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.token_entropy, want.token_entropy.float(), rtol=1e-5, atol=1e-6)


def test_a_live_target_outside_its_scope_makes_its_loss_nan(device):
    case = make_case("own", live="all")
    for wrong in (FIRST_ID - 1, FIRST_ID + 89, 1 << 62, -(1 << 62)):
        case.targets[:, 0] = wrong
        got = run(case, OPTIONS["plain"], device)
        assert got.stream_loss.isnan().tolist() == [True, False, False]
        assert got.token_nll[case.rows, 0].isnan().all() and got.token_nll[case.rows, 1:].isfinite().all()
        assert got.grad.isfinite().all()


def test_row_index_outside_the_targets(device, request):
    case = make_case("full_and_codec", live="all")
    clean = run(case, OPTIONS["plain"], device)
    for wrong in (case.live.shape[0], -1, 1 << 60):
        broken = replace(case, rows=case.rows.clone())
        broken.rows[3] = wrong
        if request.node.callspec.params["device"] == "cpu":
            with pytest.raises(ValueError, match=rf"rows\[3\] is {wrong}"):
                run(broken, OPTIONS["plain"], device)
            continue
        got = run(broken, OPTIONS["plain"], device)
        others = torch.arange(len(case.rows)) != 3
        assert got.stream_loss.isnan().all() and (got.grad[3] == 0).all()
        assert torch.equal(got.grad[others], clean.grad[others]) and got.column_sums.isfinite().all()


@pytest.mark.parametrize("name", ["full_and_codec", "odd_borders"])
def test_cuda_bits_do_not_depend_on_the_order_of_threads(name):
    case = make_case(name, num_rows=70)
    results = []
    for seed in list(cuda_on_cpu.SEEDS)[:4]:
        with cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load(), seed=seed):
            results.append(run(case, OPTIONS["all"]))
    assert all(result.equals(results[0]) for result in results)


def test_cuda_binding_checks_its_own():
    """What only the CUDA side is given; the rest is checked by the same lines on both."""
    case = make_case("own", bias=False)
    native = cuda_on_cpu.load()
    case.z = case.z.bfloat16()
    needed = native.multistream_loss_workspace(case.z, 3, case.streams, True)
    assert needed > 0

    def call(workspace, streams=case.streams):
        native.forget_memory()
        native.multistream_loss_rows(
            case.z, case.rows, case.targets, case.live, case.coef, None, None, streams, 0.0, 0.0, 0.0, False, None,
            None, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64), None, 1, workspace, 0,
        )  # fmt: skip

    call(torch.empty(needed, dtype=torch.uint8))
    for workspace, message in (
        (None, "workspace must be given on CUDA"),
        (torch.empty(100, dtype=torch.uint8), r"workspace must have \d+ bytes; got uint8 \[100\]"),
        (torch.empty(needed), "workspace must be uint8"),
        (torch.empty(needed + 64, dtype=torch.uint8)[8:], "multiple of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            call(workspace)
    streams = [(s, False, wants, [(5, 20, 4), (0, 21, 3)]) for s, _, wants, _ in case.streams]
    with pytest.raises(
        ValueError, match="must ascend and not overlap; columns 21 to 24 come after those up to 24"
    ):
        call(torch.empty(needed, dtype=torch.uint8), streams)
