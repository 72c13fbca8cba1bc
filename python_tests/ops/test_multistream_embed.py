"""multistream_embed and segment_sum against loops in float64."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx

SETTINGS = {
    "plain": {},
    "pad_minus_one": dict(pad_id=-1),
    "pad_three": dict(pad_id=3),
    "offsets": dict(offsets=[0, 5, 10]),
    "zero_offsets": dict(offsets=[0, 0, 0]),
    "scale": dict(scale=[1.0, -0.5, 2.0]),
    "all": dict(pad_id=2, offsets=[3, 0, 7], scale=[0.0, 1.5, 2.0]),
}


def naive(ids, table, pad_id=0, offsets=None, scale=None):
    rows = []
    for n in range(ids.shape[0]):
        total = torch.zeros(table.shape[1], dtype=torch.float64)
        for s in range(ids.shape[1]):
            if int(ids[n, s]) != pad_id:
                row = int(ids[n, s]) + (offsets[s] if offsets else 0)
                total = total + (scale[s] if scale else 1.0) * table[row].double()
        rows.append(total)
    return torch.stack(rows)


def make_ids(pad_id, dtype=torch.int64, num_rows=17):
    ids = torch.randint(0, 5, (num_rows, 3), dtype=dtype)
    ids[torch.rand(ids.shape) < 0.3] = pad_id
    ids[4] = pad_id  # a row of pads alone
    return ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_matches_float64_loop(settings, id_dtype, dtype):
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), id_dtype)
    table = torch.randn(20, 9).to(dtype)
    got = sx.ops.multistream_embed(ids, table, **options)
    assert got.dtype == dtype
    # Summed in float32 and rounded once.
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), naive(ids, table, **options), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients(settings):
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), num_rows=6)
    table = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sx.ops.multistream_embed(ids, t, **options), (table,))


@pytest.mark.parametrize("options", [{}, dict(offsets=[0, 1, 2]), dict(scale=[1.0, 1.0, 1.0])])
def test_pads_are_exactly_zero_even_where_the_table_is_not_finite(options):
    table = torch.full((9, 4), float("nan"))
    table[5:] = 1.0
    table.requires_grad_()
    ids = torch.tensor([[0, 0, 0], [0, 5, 0]])
    out = sx.ops.multistream_embed(ids, table, **options)
    assert out.tolist() == [[0.0] * 4, [1.0] * 4]
    out.sum().backward()
    assert table.grad[:5].abs().sum() == 0


def test_empty_block_keeps_the_graph():
    table = torch.randn(5, 3, requires_grad=True)
    out = sx.ops.multistream_embed(torch.zeros(0, 2, dtype=torch.int64), table)
    assert out.shape == (0, 3)
    out.sum().backward()
    assert torch.equal(table.grad, torch.zeros(5, 3))


def test_compiles():
    table, ids = torch.randn(20, 9), make_ids(0)
    compiled = torch.compile(sx.ops.multistream_embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, table), sx.ops.multistream_embed(ids, table))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, 2), {}, "ids must be int32 or int64"),
        (torch.zeros(3, dtype=torch.int64), {}, r"ids must be int32 or int64 \[N, S\]"),
        (
            torch.tensor([[1, 2], [3, 20]]),
            {},
            r"ids\[1, 1\] \(row 1, stream 1\) is 20; the table has rows 0 to 19",
        ),
        (torch.tensor([[1, -2]]), {}, r"ids\[0, 1\]"),
        (torch.tensor([[1, 12]]), dict(offsets=[0, 10]), "with offset 10 row 22"),
        (torch.tensor([[1, 2]]), dict(offsets=[0]), "offsets must have 2 values"),
        (torch.tensor([[1, 2]]), dict(scale=[1.0]), "scale must have 2 values"),
    ],
)
def test_rejects_bad_input(ids, options, message):
    with pytest.raises(ValueError, match=message):
        sx.ops.multistream_embed(ids, torch.randn(20, 4), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_segment_sum(dtype):
    values = torch.randn(50, 7).to(dtype)
    ids = torch.randint(0, 6, (50,), dtype=torch.int32)
    want = torch.stack([values[ids == k].double().sum(dim=0) for k in range(8)])
    got = sx.ops.segment_sum(values, ids, 8)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(got[6:], torch.zeros(2, 7, dtype=dtype))


def test_segment_sum_gradients_and_bad_input():
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 2, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda v: sx.ops.segment_sum(v, ids, 3), (values,))
    with pytest.raises(ValueError, match=r"must be in \[0, 2\); got values from 0 to 2"):
        sx.ops.segment_sum(values, ids, 2)
    with pytest.raises(ValueError, match=r"segment_ids must be int32 or int64 \[6\]"):
        sx.ops.segment_sum(values, ids[:3], 3)
