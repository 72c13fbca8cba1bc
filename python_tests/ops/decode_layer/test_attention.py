"""decode_attention: its values, ranges of keys, and that a request's bits depend on that request alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.decode_layer.cases import DTYPES, SETS, assert_close, make_cache
from speechlm_ext.ops.decode_layer import decode_attention, reference

#: Name -> window, softcap, whether there are sinks.
RULES = {
    "plain": (None, None, False),
    "window": (70, None, False),
    "softcap": (None, 1.5, False),
    "sinks": (None, None, True),
    "all": (129, 2.0, True),
}


def make_case(heads, groups, key_size, value_size, dtype, device, lengths, num_keys=300):
    """query, keys, values, lengths, slot; the slots in another order than the rows."""
    num_rows = len(lengths)
    keys, values = make_cache(num_rows + 2, num_keys, groups, key_size, value_size, dtype)
    query = torch.randn(num_rows, heads, key_size).to(dtype)
    slot = torch.randperm(num_rows + 2)[:num_rows]
    return [t.to(device) for t in (query, keys, values, torch.tensor(lengths, dtype=torch.int64), slot)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 16), (9, 3, 64, 64), (4, 4, 7, 13), (8, 1, 40, 72), (10, 2, 8, 130)]
)
def test_matches_reference(shape, rule, dtype, device):
    window, softcap, has_sinks = RULES[rule]
    lengths = [1, 16, 127, 129, 300] if dtype in (torch.float32, torch.bfloat16) else [3, 257]
    case = make_case(*shape, dtype, device, lengths)
    query, keys, values, length, slot = case
    sinks = torch.randn(shape[0], device=device) if has_sinks else None
    got = decode_attention(*case, 0.3, window, softcap, sinks)
    assert got.dtype == dtype
    exact = reference.decode_attention(
        query.double(), keys.double(), values.double(), length, slot, 0.3, window, softcap, sinks
    )
    assert_close(got, exact, roundings=1, terms=40)


def test_reference_is_scaled_dot_product_attention():
    """The oracle of these tests, judged by torch's own."""
    query, keys, values, length, slot = make_case(6, 2, 16, 16, torch.float64, "cpu", [1, 40, 300])
    got = reference.decode_attention(query, keys, values, length, slot, 0.3, 50, None, None)
    for m, (size, at) in enumerate(zip(length.tolist(), slot.tolist(), strict=True)):
        k, v = (x[at, max(0, size - 50) : size].transpose(0, 1)[None] for x in (keys, values))
        want = F.scaled_dot_product_attention(query[m][None, :, None], k, v, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got[m], want.flatten())


def test_no_keys_and_ranges_out_of_the_cache(device):
    lengths = [0, -5, -(2**63), 10, 10, 400, 2**62]
    query, keys, values, length, slot = make_case(4, 2, 16, 16, torch.float32, device, lengths)
    slot[3], slot[4] = -1, 9
    got = decode_attention(query, keys, values, length, slot, 0.3)
    assert not got[:5].any()
    length[5:] = 300
    assert (
        torch.equal(got, decode_attention(query, keys, values, length, slot, 0.3)) and got[5:].abs().min() > 0
    )
    sinks = torch.zeros(4, device=device)
    assert not decode_attention(query, keys, values, length, slot, 0.3, sinks=sinks)[:5].any()


@pytest.mark.parametrize("shape", [(0, 1, 1, 4, 4), (2, 0, 1, 4, 4), (2, 2, 1, 4, 0), (2, 2, 1, 0, 4)])
def test_nothing_to_compute(shape, device):
    num_rows, heads, groups, key_size, value_size = shape
    case = make_case(heads, groups, key_size, value_size, torch.float32, device, [200] * num_rows)
    got = decode_attention(*case, 0.3)
    assert got.shape == (num_rows, heads * value_size)
    if key_size == 0:  # all scores are 0
        want = case[2][case[4], :200].mean(1).expand(-1, heads, -1).flatten(1)
        torch.testing.assert_close(got, want)
    empty = torch.zeros(0, 5, 1, 4, device=device)
    none = torch.zeros(2, dtype=torch.int64, device=device)
    assert not decode_attention(torch.randn(2, 3, 4, device=device), empty, empty, none + 1, none, 1.0).any()


@pytest.mark.parametrize("window", [None, 100])
def test_rows_outside_do_not_matter(window, device):
    query, keys, values, length, slot = make_case(
        6, 2, 24, 20, torch.float32, device, [1, 130, 255, 256, 300]
    )
    want = decode_attention(query, keys, values, length, slot, 0.3, window)
    row = torch.arange(300, device=device)
    outside = torch.ones(7, 300, dtype=torch.bool, device=device)
    for at, size in zip(slot.tolist(), length.tolist(), strict=True):
        outside[at] = (row >= size) | (row < (0 if window is None else size - window))
    keys[outside], values[outside] = float("nan"), float("inf")
    assert torch.equal(decode_attention(query, keys, values, length, slot, 0.3, window), want)


def test_values_that_are_not_finite(device):
    """A NaN in a row that is seen reaches its own request's heads alone; a score of minus infinity has no weight."""
    query, keys, values, length, slot = make_case(2, 2, 16, 16, torch.float32, device, [300, 300])
    want = decode_attention(query, keys, values, length, slot, 0.3)
    keys[slot[0], 7, 1] = float("nan")
    got = decode_attention(query, keys, values, length, slot, 0.3)
    assert got[0, 16:].isnan().all()
    assert torch.equal(got[0, :16], want[0, :16]) and torch.equal(got[1], want[1])
    query[1] = query[1].abs()
    keys[slot[1], :256] = -float("inf")  # whole splits
    got = decode_attention(query, keys, values, length, slot, 0.3)
    k, v = keys[slot[1], 256:].transpose(0, 1), values[slot[1], 256:].transpose(0, 1)
    want = F.scaled_dot_product_attention(query[1][:, None], k, v, scale=0.3)
    torch.testing.assert_close(got[1], want.flatten())


def test_scores_far_apart(device):
    """Large scores neither overflow nor lose the others."""
    query, keys, values, length, slot = make_case(2, 1, 16, 16, torch.float32, device, [300])
    got = decode_attention(query * 100, keys, values, length, slot, 1.0)
    exact = reference.decode_attention(
        (query * 100).double(), keys.double(), values.double(), length, slot, 1.0, None, None, None
    )
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["plain", "all"])
def test_bits_of_a_request_depend_on_it_alone(rule, dtype):
    """In any batch, for any number of threads and every instruction set."""
    window, softcap, has_sinks = RULES[rule]
    lengths = [int(n) for n in torch.randint(1, 400, (33,))]
    query, keys, values, length, slot = make_case(6, 2, 40, 24, dtype, "cpu", lengths, num_keys=400)
    options = (0.3, window, softcap, torch.randn(6) if has_sinks else None)

    def attend(rows):
        return decode_attention(query[rows], keys, values, length[rows], slot[rows], *options)

    alone = torch.cat([attend(slice(m, m + 1)) for m in range(33)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for name in SETS:
                with simd(name):
                    for num_rows in (1, 2, 7, 16, 33):
                        assert torch.equal(attend(slice(0, num_rows)), alone[:num_rows]), (name, threads)
                        assert torch.equal(attend(slice(33 - num_rows, 33)), alone[33 - num_rows :])
                    longer = torch.cat([keys, keys], dim=1), torch.cat([values, values], dim=1)
                    assert torch.equal(decode_attention(query, *longer, length, slot, *options), alone)
    finally:
        torch.set_num_threads(before)


def test_bits_of_the_cuda_kernels_depend_on_the_request_alone(device):
    lengths = [1, 255, 256, 257, 600, 513]
    query, keys, values, length, slot = make_case(6, 2, 16, 16, torch.float32, device, lengths, num_keys=600)
    together = decode_attention(query, keys, values, length, slot, 0.3)
    for m in range(6):
        rows = slice(m, m + 1)
        alone = decode_attention(query[rows], keys[:, :600], values, length[rows], slot[rows], 0.3)
        assert torch.equal(alone, together[rows])
    longer = [torch.cat([x, x], dim=1) for x in (keys, values)]
    assert torch.equal(decode_attention(query, *longer, length, slot, 0.3), together)


def test_strided_cache_and_query(device):
    query, keys, values, length, slot = make_case(4, 2, 16, 8, torch.float32, device, [5, 200])
    want = decode_attention(query, keys, values, length, slot, 0.3)
    wide_keys = torch.full((4, 2, 600, 2, 16), float("nan"), device=device)
    wide_values = torch.full((300, 4, 2, 8), float("nan"), device=device)
    wide_keys[:, 1, ::2], wide_values[:] = keys, values.transpose(0, 1)
    wide_query = torch.stack([query, query], dim=-1)[..., 0]
    got = decode_attention(wide_query, wide_keys[:, 1, ::2], wide_values.transpose(0, 1), length, slot, 0.3)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 3, 8)), "multiple of 2 heads"),
        (dict(query=torch.zeros(2, 4, 9)), "query must have size 8 in dimension 2"),
        (dict(query=torch.zeros(2, 32)), r"query must be \[M, H, E\]"),
        (dict(keys=torch.zeros(3, 9, 2, 8).double()), "keys must be float32; got float64"),
        (
            dict(values=torch.zeros(3, 9, 8, 2).transpose(2, 3)),
            "values must be contiguous in dimensions 2 and later",
        ),
        (dict(lengths=torch.zeros(2, dtype=torch.int32)), "lengths must be int64"),
        (dict(slot=torch.zeros(3, dtype=torch.int64)), "slot must have size 2"),
        (dict(window=0), "window must be 1 or more"),
        (dict(softcap=0.0), "softcap must be above 0"),
        (dict(sinks=torch.zeros(3)), "sinks must have size 4"),
        (dict(keys=torch.zeros(3, 9, 2, 8, requires_grad=True)), "has no gradients"),
    ],
)
def test_rejects_bad_input(change, message):
    arguments = dict(
        query=torch.zeros(2, 4, 8),
        keys=torch.zeros(3, 9, 2, 8),
        values=torch.zeros(3, 9, 2, 8),
        lengths=torch.ones(2, dtype=torch.int64),
        slot=torch.arange(2),
        scale=1.0,
    )
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **change})
