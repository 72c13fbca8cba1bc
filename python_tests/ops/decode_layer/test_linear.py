"""decode_linear: its values, and that a row's bits depend on that row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.decode_layer.cases import DTYPES, NUM_ROWS, SETS, assert_close
from speechlm_ext.ops.decode_layer import decode_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("width", "num_outputs"), [(0, 3), (1, 1), (15, 7), (16, 8), (47, 21), (130, 9)])
def test_matches_reference(width, num_outputs, num_rows, dtype, has_bias):
    x, weight = torch.randn(num_rows, width).to(dtype), torch.randn(num_outputs, width).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(decode_linear(x, weight, bias), exact, roundings=1, terms=width // 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 513])
def test_bits_of_a_row_depend_on_it_alone(width, dtype):
    """For any number of rows before and after it, any number of threads, and every instruction set."""
    # Made in float64: products of values that fit into float32 would be exact there, whatever the order.
    shapes = (33, width), (150, width), (150,)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    alone = torch.cat([decode_linear(row[None], weight, bias) for row in x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name in SETS if threads == 1 else SETS[-1:]:
                with simd(name):
                    for num_rows in (1, 2, 3, 5, 6, 7, 13, 16, 17, 33):
                        first = 33 - num_rows
                        assert torch.equal(decode_linear(x[first:], weight, bias), alone[first:]), (
                            name,
                            num_rows,
                        )
                        assert torch.equal(decode_linear(x[:num_rows], weight, bias), alone[:num_rows])
    finally:
        torch.set_num_threads(before)


def test_part_of_a_fused_weight_and_other_strides():
    fused = torch.randn(24, 100)
    x = torch.randn(5, 80)[:, ::2]
    for weight in (fused[3:17, :40], fused[:, 60:], fused[::2, 7:47], torch.randn(40, 9).T):
        assert torch.equal(decode_linear(x, weight), decode_linear(x.contiguous(), weight.contiguous()))
        torch.testing.assert_close(decode_linear(x, weight), F.linear(x, weight))
    bias = torch.randn(48)[::2]
    torch.testing.assert_close(decode_linear(x, fused[:, :40], bias), F.linear(x, fused[:, :40], bias))


def test_one_row_of_many_panels():
    """More weight than one panel of a thread holds, and rows of several tiles."""
    x, weight = torch.randn(35, 1024), torch.randn(300, 1024)
    assert_close(decode_linear(x, weight), F.linear(x.double(), weight.double()), terms=128)


def test_values_that_are_not_finite_stay_in_their_row():
    x, weight = torch.randn(6, 20), torch.randn(10, 20)
    want = decode_linear(x, weight)
    x[2, 3], x[4, 19] = float("nan"), float("inf")
    got = decode_linear(x, weight)
    assert got[2].isnan().all() and got[4].isinf().all()
    rest = [0, 1, 3, 5]
    assert torch.equal(got[rest], want[rest])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(4, 5),
            None,
            r"weight must have size 3 in dimension 1; got float32 \[4, 5\]",
        ),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), None, "weight must be float32; got float64"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), "bias must have size 4"),
        (torch.zeros(3), torch.zeros(4, 3), None, r"x must be \[M, K\] and weight \[N, K\]"),
        (torch.zeros(2, 3).long(), torch.zeros(4, 3).long(), None, "x must be float32 or"),
        (torch.zeros(2, 3), torch.zeros(4, 3, requires_grad=True), None, "has no gradients"),
    ],
)
def test_rejects_bad_input(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        decode_linear(x, weight, bias)
