"""RMSNorm, rotary positions and SwiGLU over packed rows, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from python_tests.ops.common.instruction_sets import simd
from speechlm_ext.ops import OpError
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.packed_layer import packed_rms_norm, packed_rotary, packed_swiglu, reference

ROWS = [0, 1, 2, 63, 64, 65, 200]
#: Relative to the largest value of a result.
TOLERANCE = 2e-6


def norm_case(rows: int, width: int, scale: float = 1.0):  # type: ignore[no-untyped-def]
    x = torch.randn(rows, width) * scale
    return (lambda f: lambda x, w: f(x, w, 1e-5)), (x, torch.randn(width))


def rotary_case(rows: int, width: int, heads: int = 3):  # type: ignore[no-untyped-def]
    angle = torch.randn(rows, 2 * width) * 3  # halves that differ: no symmetry hides an exchange
    return (lambda f: lambda x: f(x, angle.cos().to(x), angle.sin().to(x))), (
        torch.randn(rows, heads, 2 * width),
    )


def swiglu_case(rows: int, width: int, scale: float = 4.0):  # type: ignore[no-untyped-def]
    return (lambda f: f), (torch.randn(rows, width) * scale, torch.randn(rows, width))


OPS = {
    "norm": (packed_rms_norm, reference.packed_rms_norm, norm_case),
    "rotary": (packed_rotary, reference.packed_rotary, rotary_case),
    "swiglu": (packed_swiglu, reference.packed_swiglu, swiglu_case),
}


def with_gradients(call, inputs, grad):  # type: ignore[no-untyped-def]
    """The result and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype), materialize_grads=True)
    return [out.detach(), *grads]


def assert_near(ours, exact, tolerance=TOLERANCE):  # type: ignore[no-untyped-def]
    rest = min((b.abs().max() for b in exact if b.numel() and b.any()), default=0)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert a.isfinite().all()
        if b.numel():
            # A gradient that cancels to 0 has the rounding of its terms.
            assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max(), rest)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [2, 15, 16, 33, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_matches_float64(op, rows, width):
    torch.manual_seed(0)
    ours, exact, make = OPS[op]
    bind, inputs = make(rows, width)
    grad = torch.randn_like(bind(exact)(*inputs))
    expected = with_gradients(bind(exact), [x.double() for x in inputs], grad)
    assert_near(with_gradients(bind(ours), inputs, grad), expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6, 1e15])
def test_norm_of_small_and_large_rows(scale):
    torch.manual_seed(0)
    bind, inputs = norm_case(20, 40, scale)
    grad = torch.randn(20, 40)
    expected = with_gradients(bind(reference.packed_rms_norm), [x.double() for x in inputs], grad)
    assert_near(with_gradients(bind(packed_rms_norm), inputs, grad), expected, 1e-5)


def test_swiglu_of_extreme_gates():
    gate = torch.tensor([[-1e30, -200.0, -90.0, -86.0, 0.0, 1e-20, 86.0, 90.0, 1e30]])
    up, grad = torch.full_like(gate, 2.0), torch.ones_like(gate)
    assert_near(
        with_gradients(packed_swiglu, (gate, up), grad),
        with_gradients(reference.packed_swiglu, (gate.double(), up.double()), grad),
    )


@pytest.mark.parametrize("op", OPS)
def test_not_a_number_stays_one(op):
    ours, _, make = OPS[op]
    bind, inputs = make(4, 32)
    inputs[0][1].view(-1)[3] = float("nan")
    isnan = bind(ours)(*inputs).flatten(1).isnan().any(1)
    assert isnan.tolist() == [False, True, False, False]


@pytest.mark.parametrize("op", OPS)
def test_equal_bits_for_every_instruction_set_and_number_of_threads(op):
    torch.manual_seed(0)
    ours, _, make = OPS[op]
    bind, inputs = make(1000, 80)
    grad = torch.randn_like(bind(ours)(*inputs))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name in native.simd_available():
                with simd(name):
                    results.append(with_gradients(bind(ours), inputs, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op):
    ours, _, make = OPS[op]
    bind, inputs = make(10, 32)
    strided = [torch.stack((x, x), -1)[..., 0] for x in inputs]
    grad = torch.randn_like(bind(ours)(*inputs))
    for a, b in zip(
        with_gradients(bind(ours), inputs, grad), with_gradients(bind(ours), strided, grad), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_compile(op):
    ours, _, make = OPS[op]
    bind, inputs = make(6, 16)
    leaves = tuple(x.requires_grad_() for x in inputs)
    raw = {
        "norm": (torch.ops.speechlm_ext.packed_rms_norm.default, (*leaves, 1e-5)),
        "rotary": (
            torch.ops.speechlm_ext.packed_rotary.default,
            (*leaves, torch.randn(6, 32), torch.randn(6, 32), False),
        ),
        "swiglu": (torch.ops.speechlm_ext.packed_swiglu.default, leaves),
    }
    torch.library.opcheck(*raw[op])
    compiled = torch.compile(bind(ours), fullgraph=True, backend="aot_eager", dynamic=True)
    grad = torch.ones_like(bind(ours)(*inputs))
    for a, b in zip(
        with_gradients(compiled, inputs, grad), with_gradients(bind(ours), inputs, grad), strict=True
    ):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit():
    x = torch.randn(3, 8)
    for call in (
        lambda: packed_rms_norm(x.double(), torch.ones(8), 1e-5),
        lambda: packed_rms_norm(x, torch.ones(7), 1e-5),
        lambda: packed_rms_norm(x[0], torch.ones(8), 1e-5),
        lambda: packed_rotary(x, x, x),
        lambda: packed_rotary(torch.randn(3, 2, 7), torch.randn(3, 7), torch.randn(3, 7)),
        lambda: packed_rotary(torch.randn(3, 2, 8), torch.randn(2, 8), torch.randn(3, 8)),
        lambda: packed_rotary(torch.randn(3, 2, 8), torch.randn(3, 8).requires_grad_(), torch.randn(3, 8)),
        lambda: packed_swiglu(x, torch.randn(3, 7)),
        lambda: packed_swiglu(x.bfloat16(), x.bfloat16()),
    ):
        with pytest.raises(OpError, match="packed_"):
            call()
