"""scatter_sum_rows, the sparse gradient of multistream_embed that is made of it, and segment_sum."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import speechlm_ext as sx
from python_tests.conftest import CUDA_ON_CPU, on_device
from python_tests.ops.multistream_embed.cases import DTYPES, SETTINGS, assert_no_worse, make_ids, rule_of
from speechlm_ext.ops.multistream_embed.reference import multistream_embed as embed_reference
from speechlm_ext.ops.scatter_sum import reference
from speechlm_ext.ops.scatter_sum.scatter_sum import lazy_zeros


def gradient(ids, table, grad, **options):
    """Of the table, straight from autograd: `.grad` forgets that a sparse tensor is coalesced."""
    return torch.autograd.grad(sx.ops.multistream_embed(ids, table, **options), table, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_match_reference(settings, id_dtype, dtype, device):
    options = SETTINGS[settings]
    pad_id, offsets, scale = rule_of(options)
    ids = make_ids(pad_id, id_dtype).to(device)
    values = torch.randn(17, 9, device=device).to(dtype)
    rows, sums = sx.ops.scatter_sum_rows(values, ids, 20, **options)
    assert rows.dtype == torch.int64 and sums.dtype == dtype
    want_rows, exact = reference.scatter_sum_rows(values.double(), ids, pad_id, offsets, scale)
    assert torch.equal(rows, want_rows)
    assert_no_worse(sums, reference.scatter_sum_rows(values, ids, pad_id, offsets, scale)[1], exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 63, 260])
@pytest.mark.parametrize("scale", [None, [0.3, -1.7, 1e-3]])
def test_sparse_gradient_is_the_dense_one(scale, width, dtype, device):
    """To the bit, also of rows that occur more often than a piece or a chunk holds."""
    ids = torch.randint(0, 40, (400, 3))
    ids[torch.rand(ids.shape) < 0.3] = 7
    ids = ids.to(device)
    table = torch.randn(50, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(400, width, device=device).to(dtype)
    dense = gradient(ids, table, grad, scale=scale)
    sparse = gradient(ids, table, grad, scale=scale, sparse=True)
    assert sparse.is_coalesced() and sparse.shape == table.shape and sparse.dtype == dtype
    rows = sparse.indices()[0]
    assert torch.equal(rows, ids[ids != 0].unique())
    assert torch.equal(sparse.values(), dense[rows])
    dense[rows] = 0
    assert not dense.any()


@pytest.mark.parametrize("start", [0, 1, 128, 5000])
@pytest.mark.parametrize("count", [64 * 128 * 3 + 77, 64 * 128])
def test_one_id_very_often(count, start, device):
    """Whole numbers, of which every order has the same sum."""
    ids = torch.cat([torch.arange(start) % 3, torch.full((count,), 4), torch.tensor([5, 5])])[:, None]
    values = torch.randint(-9, 10, (len(ids), 2)).float()
    rows, sums = sx.ops.scatter_sum_rows(values.to(device), ids.to(device), 6, pad_id=None)
    want = torch.zeros(6, 2).index_add_(0, ids[:, 0], values)
    assert torch.equal(rows.cpu(), ids.unique()) and torch.equal(sums.cpu(), want[ids.unique()])


@pytest.mark.parametrize("width", [1, 8, 12, 264])
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_between_the_touched_ones_are_zero(dtype, num_rows, width, device):
    """New memory is not zero here: untouched rows before, between and behind, and none; with pads and without."""
    for touched in (
        {0},
        {num_rows - 1},
        {num_rows // 2},
        set(range(num_rows)),
        set(range(0, num_rows, 7)),
        set(),
    ):
        for num_pads in (0, 3):
            rows = [*sorted(touched), *[-1] * num_pads]
            ids = torch.tensor(rows, dtype=torch.int64)[:, None].expand(-1, 2)
            values = torch.randn(len(rows), width).to(dtype)
            got = torch.ops.speechlm_ext.scatter_sum(values.to(device), ids.to(device), -1, [], [], num_rows)
            want = torch.zeros(num_rows, width, dtype=dtype)
            want[sorted(touched)] = (2 * values[: len(touched)].float()).to(dtype)
            assert torch.equal(got.cpu(), want), (touched, num_pads)


def test_long_runs_are_joined_in_groups(request):
    """To the bit: sums of 128 pairs, of 64 such sums that lie inside the run, and of what is left, each in order."""
    chunk, group = 128, 64 * 128
    count = 3 * group + 300
    values = torch.randn(count, 1)
    with on_device(CUDA_ON_CPU, request.node) as device:
        ids = torch.zeros(count, 1, dtype=torch.int64, device=device)
        _, sums = sx.ops.scatter_sum_rows(values, ids, 1, pad_id=None)

    def in_order(parts):
        return functools.reduce(torch.add, parts)

    partials = [in_order(part.unbind()) for part in values[:, 0].split(chunk)]
    groups = [in_order(partials[n * 64 : n * 64 + 64]) for n in (1, 2)]
    assert torch.equal(sums[0, 0], in_order(partials[:64] + groups + partials[3 * 64 :]))
    assert not torch.equal(sums[0, 0], in_order(partials)), "another order would not be seen"


def test_rows_are_the_same_for_any_number_of_threads():
    ids = torch.randint(0, 30, (3000, 5))
    ids[:1000, 0] = 3
    values = torch.randn(3000, 33)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(sx.ops.scatter_sum_rows(values, ids, 30, scale=[1.0, 0.3, 2.0, -1.0, 0.7]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_of_many_megabytes(dtype):
    """Its memory comes from elsewhere."""
    ids = torch.randperm(1500)[:, None]
    values = torch.randn(1500, 1500).to(dtype)
    rows, sums = sx.ops.scatter_sum_rows(values, ids, 1500, pad_id=None)
    assert torch.equal(rows, torch.arange(1500)) and torch.equal(sums[ids[:, 0]], values)


def test_nothing_of_the_tables_size_is_allocated(device):
    """A table of two billion rows: its gradient would take a terabyte."""
    num_rows = 2**31 - 2
    ids = torch.tensor([[5, num_rows - 1], [0, 5]], device=device)
    values = torch.randn(2, 128, device=device)
    rows, sums = sx.ops.scatter_sum_rows(values, ids, num_rows)
    assert rows.tolist() == [5, num_rows - 1]
    torch.testing.assert_close(sums, torch.stack([values[0] + values[1], values[0]]))


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (4, 0)])
def test_no_touched_rows(shape, device):
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    table = torch.randn(5, 6, device=device, requires_grad=True)
    grad = gradient(ids, table, torch.randn(shape[0], 6, device=device), sparse=True)
    assert grad.shape == (5, 6) and grad._nnz() == 0 and not grad.to_dense().any()
    rows, sums = sx.ops.scatter_sum_rows(torch.randn(shape[0], 0, device=device), ids, 5, pad_id=None)
    assert rows.tolist() == ([0] if ids.numel() else []) and sums.shape == (len(rows), 0)


def test_optimizers_take_the_sparse_gradient():
    """SGD exactly as with the dense gradient; SparseAdam as Adam where every row is touched at every step."""
    ids = torch.cat([torch.arange(1, 13).view(4, 3), torch.randint(0, 13, (30, 3))])
    begin, goal = torch.randn(13, 8), torch.randn(34, 8)

    def trained(make, sparse, embed=None):
        table = torch.nn.Parameter(begin.clone())
        optimizer = make([table])
        for _ in range(4):
            optimizer.zero_grad()
            out = embed(table) if embed else sx.ops.multistream_embed(ids, table, sparse=sparse)
            (out - goal).square().sum().backward()
            assert table.grad.is_sparse == sparse
            optimizer.step()
        return table.detach()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.01)

    assert torch.equal(trained(sgd, True), trained(sgd, False))
    adam = trained(lambda p: torch.optim.Adam(p, lr=0.01), False)
    sparse_adam = trained(lambda p: torch.optim.SparseAdam(p, lr=0.01), True)
    torch.testing.assert_close(sparse_adam[1:], adam[1:], rtol=1e-5, atol=1e-6)
    rival = trained(
        lambda p: torch.optim.SparseAdam(p, lr=0.01),
        True,
        lambda table: (F.embedding(ids, table, sparse=True) * (ids != 0)[..., None]).sum(1),
    )
    torch.testing.assert_close(sparse_adam, rival, rtol=1e-5, atol=1e-6)
    assert torch.equal(sparse_adam[0], begin[0])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        trained(lambda p: torch.optim.AdamW(p, lr=0.01), True)


def test_a_tied_table_gets_a_dense_gradient():
    ids = make_ids(0)
    table = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)

    def gradient_of(sparse):
        out = sx.ops.multistream_embed(ids, table, sparse=sparse) @ table.T
        return torch.autograd.grad(out.square().sum(), table)[0]

    assert not gradient_of(True).is_sparse
    torch.testing.assert_close(gradient_of(True), gradient_of(False))


def test_two_uses_of_a_table_add_up():
    table = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    first, second = make_ids(0), make_ids(0)

    def loss(sparse):
        out = sx.ops.multistream_embed(first, table, sparse=sparse)
        return (
            (out + sx.ops.multistream_embed(second, table, sparse=True, scale=[1.0, 2.0, 3.0])).pow(2).sum()
        )

    (both,) = torch.autograd.grad(loss(True), table)
    (mixed,) = torch.autograd.grad(loss(False), table)
    (want,) = torch.autograd.grad(
        (
            embed_reference(first, table, 0, None, None)
            + embed_reference(second, table, 0, None, [1.0, 2.0, 3.0])
        )
        .pow(2)
        .sum(),
        table,
    )
    for got in (both, mixed):
        torch.testing.assert_close(got.to_dense() if got.is_sparse else got, want)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_of_rows_numerically(settings):
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), num_rows=6)
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def sums(v):
        return sx.ops.scatter_sum_rows(v, ids, 20, **options)[1]

    assert torch.autograd.gradcheck(sums, (values,))
    assert torch.autograd.gradgradcheck(lambda v: sums(v).pow(2), (values,))


@pytest.mark.parametrize("settings", ["plain", "all"])
def test_gradients_of_rows(settings, device):
    options = SETTINGS[settings]
    pad_id, offsets, scale = rule_of(options)
    ids = make_ids(pad_id).to(device)
    values = torch.randn(17, 3, dtype=torch.float64, device=device, requires_grad=True)
    rows, sums = sx.ops.scatter_sum_rows(values, ids, 20, **options)
    grad = torch.randn(20, 3, dtype=torch.float64, device=device)
    (got,) = torch.autograd.grad(sums, values, grad[rows])
    want = embed_reference(ids, grad, pad_id, offsets, scale)
    torch.testing.assert_close(got, want)


def test_opcheck_of_rows(device):
    ids = make_ids(0).to(device)
    values = torch.randn(17, 9, device=device, requires_grad=True)
    table = torch.randn(20, 9, device=device, requires_grad=True)
    for rule in ((0, [], []), (-1, [0, 5, 10], [0.5, 1.0, 2.0])):
        opcheck(torch.ops.speechlm_ext.scatter_sum_rows, (values, ids, *rule, 20))
        opcheck(torch.ops.speechlm_ext.multistream_embed, (ids, table, *rule, None, None, True, False))


def test_sparse_gradient_in_compiled_code_and_export(monkeypatch):
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):  # docs/wheels.md names the setting
        monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    table, ids, grad = torch.randn(20, 9, requires_grad=True), make_ids(0), torch.randn(17, 9)

    def embed(ids, table):
        return sx.ops.multistream_embed(ids, table, sparse=True) * 2

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (17, 5):  # the second touches other rows, without a new compilation
        got = torch.autograd.grad(compiled(ids[:num_rows], table), table, grad[:num_rows])[0]
        want = gradient(ids[:num_rows], table, 2 * grad[:num_rows], sparse=True)
        assert got.is_sparse and torch.equal(got.to_dense(), want.to_dense())

    class Embed(torch.nn.Module):
        def forward(self, ids, table):
            return embed(ids, table)

    exported = torch.export.export(Embed(), (ids, table.detach()))
    assert torch.equal(exported.module()(ids, table.detach()), embed(ids, table.detach()))


def test_non_contiguous_values(device):
    ids = torch.randint(0, 9, (5, 6), device=device)[:, ::2]
    values = torch.randn(8, 5, device=device).T
    rows, sums = sx.ops.scatter_sum_rows(values, ids, 9)
    want_rows, want = reference.scatter_sum_rows(values, ids, 0, None, None)
    assert torch.equal(rows, want_rows)
    torch.testing.assert_close(sums, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.tensor([[1, 2], [3, 20]])), r"ids\[1, 1\] \(row 1, stream 1\) is 20"),
        (dict(ids=torch.tensor([[1, 2], [3, 9]]), offsets=[0, 11]), r"is 9; .* offsets are \[0, 11\]"),
        (dict(ids=torch.zeros(2, 2)), "ids must be int32 or int64"),
        (dict(values=torch.zeros(3, 4)), r"values must be float \[2, D\]; got float32 \[3, 4\]"),
        (dict(num_rows=-1), "num_rows must be 0 or more"),
        (dict(offsets=[1]), "offsets must have 2 values"),
        (dict(scale=[1.0]), "scale must have 2 values"),
    ],
)
def test_rows_reject_bad_input(change, message):
    arguments = dict(values=torch.zeros(2, 4), ids=torch.tensor([[1, 2], [3, 4]]), num_rows=20)
    with pytest.raises(IndexError if "is " in message else ValueError, match=message):
        sx.ops.scatter_sum_rows(**{**arguments, **change})


def test_untouched_memory_is_zero():
    """Also where the memory was used before."""
    for _ in range(3):
        dirty = torch.full((2000, 300), 7.0)
        del dirty
        zeros = lazy_zeros(2000, 300, torch.float32)
        assert not zeros.any() and zeros.shape == (2000, 300)
    assert lazy_zeros(0, 5, torch.bfloat16).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_sum(dtype, device):
    values = torch.randn(50, 7).to(dtype).to(device)
    ids = torch.randint(0, 6, (50,), dtype=torch.int32, device=device)
    want = torch.stack([values[ids == k].double().sum(dim=0) for k in range(8)])
    got = sx.ops.segment_sum(values, ids, 8)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(got[6:], torch.zeros(2, 7, dtype=dtype, device=device))


def test_segment_sum_gradients_and_bad_input():
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 2, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda v: sx.ops.segment_sum(v, ids, 3), (values,))
    with pytest.raises(IndexError, match=r"segment_ids\[1\] is 2; it must be in \[0, 2\)"):
        sx.ops.segment_sum(values, ids, 2)
    with pytest.raises(ValueError, match=r"segment_ids must be int32 or int64 \[6\]"):
        sx.ops.segment_sum(values, ids[:3], 3)
    assert sx.ops.segment_sum(torch.zeros(0, 4), ids[:0], 3).tolist() == [[0.0] * 4] * 3
