"""multistream_loss with bfloat16 products: under autocast on the CPU, and on simulated CUDA tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import speechlm_ext as sx
from python_tests.ops.multistream_loss import narrow_errors
from python_tests.ops.multistream_loss.cases import named_case, named_formula


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Of `narrow_errors`, whose simulation changes its process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", narrow_errors.__name__],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", narrow_errors.CASES)
def test_errors_of_bfloat16_products(name, errors):
    """The logits and their gradients are rounded to bfloat16 (2^-9), the vectors' own terms are not."""
    found, (scale, dtype, *_) = errors[name], narrow_errors.CASES[name]
    assert found["stream_counts"] == 0
    assert found["stream_loss"] < (1e-3 if scale else 3e-7)
    assert found["grad_hidden"] < 4e-3
    assert found["grad_embed"] < (4e-3 if scale else 2e-5)
    assert found["grad_bias"] < (4e-3 if scale else 1e-6)
    assert found["grad_weight"] < (2e-5 if dtype == torch.float32 else 4e-3)


def test_autocast_rounds_the_factors_as_linear_does():
    """float32 parameters: the loss is that of `F.linear` under autocast but for its output's rounding, and exactly that
    of rounded factors; gradients are float32."""
    scopes, parts, targets, weights = named_case("full_and_own", num_rows=40, width=24, dtype=torch.float32)
    hidden, weight = parts[:2]
    weights = weights.float()
    plain = sx.ops.multistream_loss(hidden, weight, targets, weights, scopes=scopes).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sx.ops.multistream_loss(hidden, weight, targets, weights, scopes=scopes).loss_sum
        theirs = torch.zeros(())
        for s, [(start, end)] in enumerate(scopes):
            live = weights[:, s] > 0
            logits = F.linear(hidden[live], weight[start:end])
            assert logits.dtype == torch.bfloat16
            nll = F.cross_entropy(logits.float(), targets[live, s] - start, reduction="none")
            theirs = theirs + (nll * weights[live, s]).sum()
    rounded = [p.detach().bfloat16().double().requires_grad_() for p in (hidden, weight)]
    want, _ = named_formula(scopes, [*rounded, None, None], targets, weights.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, theirs, rtol=3e-3, atol=0)
    assert abs(float(plain.double() - want)) > 1e-5 * float(want)
    found, exact = torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, rounded)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_autocast_compiled_in_backward_and_for_logprobs():
    """Each of them rounds the factors too: the call's autocast counts, not that of its backward."""
    scopes, parts, targets, weights = named_case("full_and_own", num_rows=40, width=24, dtype=torch.float32)
    leaves = [p.detach().requires_grad_() for p in parts[:2]]
    rounded = [p.detach().bfloat16().float().requires_grad_() for p in leaves]
    weights = weights.float()

    def loss(hidden, weight, recompute=False):
        options = dict(scopes=scopes, recompute=recompute)
        return sx.ops.multistream_loss(hidden, weight, targets, weights, **options).loss_sum

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = loss(*rounded)
    exact = torch.autograd.grad(want, rounded)
    for function, options in ((loss, {}), (compiled, {}), (loss, dict(recompute=True))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = function(*leaves, **options)
        for a, b in zip((got, *torch.autograd.grad(got, leaves)), (want, *exact), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(compiled(*leaves), want)  # without autocast again
    mask = weights > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sx.ops.multistream_logprobs(*leaves, targets, mask, scopes=scopes)
    exact = sx.ops.multistream_logprobs(*rounded, targets, mask, scopes=scopes)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_autocast_leaves_other_dtypes_and_other_autocasts(dtype):
    scopes, parts, targets, weights = named_case("full_and_own", dtype=dtype)
    call = dict(scopes=scopes, stream_embed=parts[2])
    plain = sx.ops.multistream_loss(*parts[:2], targets, weights, **call).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sx.ops.multistream_loss(*parts[:2], targets, weights, **call).loss_sum, plain)
    parts = [p.detach().float() for p in parts]
    call["stream_embed"] = parts[2]
    plain = sx.ops.multistream_loss(*parts[:2], targets, weights, **call).loss_sum
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(sx.ops.multistream_loss(*parts[:2], targets, weights, **call).loss_sum, plain)
