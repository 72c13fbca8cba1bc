"""Attention inside the sequences of a packed row on the CPU, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.packed_layer.test_rows import assert_near, with_gradients
from speechlm_ext.ops import OpError
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.packed_layer import packed_attention, reference

#: Lengths of the sequences of a pack.
PACKS = {
    "empty": [],
    "one row": [1],
    "empty sequences": [0, 3, 0, 0, 17, 0],
    "around blocks": [15, 16, 17, 31, 32, 33],
    "long": [300, 1, 64],
}
HEADS = [(1, 1, 16), (4, 4, 32), (6, 2, 48), (4, 1, 64)]


def make(lengths, heads=(4, 2, 32), scale=1.0):  # type: ignore[no-untyped-def]
    H, G, E = heads
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    N = int(cu[-1])
    return cu, (torch.randn(N, H, E) * scale, torch.randn(N, G, E), torch.randn(N, G, E))


def bound(op, cu, scale=0.3, window=None):  # type: ignore[no-untyped-def]
    return lambda q, k, v: op(q, k, v, cu, scale, window)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 20, 1000])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_matches_float64(pack, heads, window):
    torch.manual_seed(0)
    cu, inputs = make(PACKS[pack], heads)
    grad = torch.randn_like(inputs[0])
    exact = with_gradients(
        bound(reference.packed_attention, cu, window=window), [x.double() for x in inputs], grad
    )
    assert_near(with_gradients(bound(packed_attention, cu, window=window), inputs, grad), exact, 4e-6)


def test_large_scores():
    """Weights of almost 0 and almost 1, with scores of either sign up to about 10,000."""
    torch.manual_seed(0)
    cu, inputs = make([50, 70], scale=3e3)
    grad = torch.randn_like(inputs[0])
    exact = with_gradients(bound(reference.packed_attention, cu), [x.double() for x in inputs], grad)
    # float32 scores of 1e4 are off by 1e-3, in plain torch too.
    assert_near(with_gradients(bound(packed_attention, cu), inputs, grad), exact, 2e-2)


def test_a_sequence_has_the_same_bits_alone_and_in_any_pack():
    torch.manual_seed(0)
    cu, inputs = make([5, 70, 33])
    grad = torch.randn_like(inputs[0])
    whole = with_gradients(bound(packed_attention, cu), inputs, grad)
    alone = torch.tensor([0, 70], dtype=torch.int32)
    part = with_gradients(bound(packed_attention, alone), [x[5:75] for x in inputs], grad[5:75])
    assert all(torch.equal(a[5:75], b) for a, b in zip(whole, part, strict=True))


def test_equal_bits_for_every_instruction_set_and_number_of_threads():
    torch.manual_seed(0)
    cu, inputs = make([40, 7, 100, 33])
    grad = torch.randn_like(inputs[0])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name in native.simd_available():
                with simd(name):
                    results.append(with_gradients(bound(packed_attention, cu, window=30), inputs, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_sequence(value):
    cu, (q, k, v) = make([20, 20, 20])
    k[25] = value
    out, *grads = with_gradients(bound(packed_attention, cu), (q, k, v), torch.ones_like(q))
    assert not out[20:40].isfinite().all()
    for result in (out, *grads):
        assert result[:20].isfinite().all() and result[40:].isfinite().all()


def test_opcheck_and_compile():
    cu, inputs = make([5, 3])
    leaves = tuple(x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.speechlm_ext.packed_attention.default, (*leaves, cu, 0.2, 0))
    call = bound(packed_attention, cu)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    grad = torch.ones_like(inputs[0])
    for a, b in zip(with_gradients(compiled, inputs, grad), with_gradients(call, inputs, grad), strict=True):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit():
    cu, (q, k, v) = make([5, 3])
    for match, call in {
        "float32": lambda: packed_attention(q.double(), k.double(), v.double(), cu, 1.0),
        "multiple of those": lambda: packed_attention(q[:, :3], k, v, cu, 1.0),
        "multiple of 16": lambda: packed_attention(*(x[..., :8] for x in (q, k, v)), cu, 1.0),
        "rise from 0": lambda: packed_attention(q, k, v, cu + 1, 1.0),
        "rise": lambda: packed_attention(q, k, v, torch.tensor([0, 6, 5, 8]).int(), 1.0),
        "at least one": lambda: packed_attention(q, k, v, cu[:0], 1.0),
        "int32": lambda: packed_attention(q, k, v, cu.long(), 1.0),
        "window": lambda: packed_attention(q, k, v, cu, 1.0, 0),
        "k must": lambda: packed_attention(q, k[:5], v, cu, 1.0),
    }.items():
        with pytest.raises(OpError, match=match):
            call()
