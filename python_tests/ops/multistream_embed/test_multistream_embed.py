"""multistream_embed and segment_sum against loops in float64, on every device and with every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import speechlm_ext as sx
from python_tests.ops.multistream_embed.cases import DTYPES, SETTINGS, assert_no_worse, make_ids
from speechlm_ext.errors import SpeechLMError
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.multistream_embed import reference


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_matches_float64_loop(settings, id_dtype, dtype, device):
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), id_dtype).to(device)
    table = torch.randn(20, 9).to(dtype).to(device)
    got = sx.ops.multistream_embed(ids, table, **options)
    assert got.dtype == dtype
    # Summed in float32 and rounded once.
    tolerance = torch.finfo(dtype).eps
    want = naive(ids.cpu(), table.cpu(), **options)
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("width", [1, 3, 4, 8, 63, 64, 72, 260])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_and_runs_that_cross_borders(dtype, width, device):
    """Every width of loads; ids that occur once, often, and more often than a piece or a chunk holds."""
    ids = torch.randint(0, 40, (400, 3))
    ids[torch.rand(ids.shape) < 0.3] = 7
    ids = ids.to(device)
    table = torch.randn(50, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(400, width, device=device).to(dtype)
    out = sx.ops.multistream_embed(ids, table)
    out.backward(grad)
    with torch.no_grad():
        real = ids.cpu() != 0
        exact_out = (table.cpu().double()[ids.cpu()] * real[..., None]).sum(1)
        # torch sums 16-bit rows in float32 in its forward, as we do.
        assert_no_worse(out, reference.multistream_embed(ids, table, 0, None, None), exact_out)
        exact = torch.zeros(50, width, dtype=torch.float64)
        exact.index_add_(0, ids.cpu()[real], grad.cpu().double()[:, None].expand(-1, 3, -1)[real])
        wide = dtype if dtype == torch.float64 else torch.float32
        rival = torch.zeros(50, width, dtype=wide)
        rival.index_add_(0, ids.cpu()[real], grad.cpu().to(wide)[:, None].expand(-1, 3, -1)[real])
    assert_no_worse(table.grad, rival.to(dtype), exact)
    assert not table.grad[40:].any() and not table.grad[0].any()


def test_gradient_is_the_same_for_any_number_of_threads():
    ids = torch.randint(0, 30, (3000, 5))
    ids[:1000, 0] = 3
    values = torch.randn(3000, 33)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(
                torch.ops.speechlm_ext.scatter_sum(values, ids, 0, [], [1.0, 0.3, 2.0, -1.0, 0.7], 30)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype):
    ids = torch.randint(0, 20, (300, 3))
    table = torch.randn(20, 107).to(dtype)
    table[3, :4] = torch.tensor([float("inf"), float("nan"), 0.0, -0.0])
    table[4, :6] = torch.tensor([1e-7, -3e-8, 6e-5, 65504.0, 7e4, -1e-40]).to(
        dtype
    )  # subnormal and huge halves

    def results():
        for scale in (None, [0.3, -1.7, 1e-3]):
            out = sx.ops.multistream_embed(ids, table, scale=scale)
            yield out
            yield torch.ops.speechlm_ext.scatter_sum(out, ids, 0, [], scale or [], 20)

    def bits(tensors):
        return [t.contiguous().view(torch.uint8) for t in tensors]

    try:
        found = {}
        for name in native.simd_available():
            native.use_simd(name)
            assert native.simd_name() == name
            found[name] = bits(results())
    finally:
        native.use_simd("")
    assert "generic" in found
    for name, other in found.items():
        assert all(torch.equal(a, b) for a, b in zip(found["generic"], other, strict=True)), name
    with pytest.raises(ValueError, match="sse9"):
        native.use_simd("sse9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_as_torch_does(dtype, device):
    """Every 16-bit pattern is read right, and sums of two are rounded to nearest even, subnormals and overflow too."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = every[torch.isfinite(every)].view(-1, 32)
    table = torch.cat([torch.zeros(1, 32, dtype=dtype), rows])
    ids = torch.stack([torch.arange(1, len(table)), torch.randint(1, len(table), (len(rows),))], 1)
    got = sx.ops.multistream_embed(ids.to(device), table.to(device)).cpu()
    want = (table.float()[ids[:, 0]] + table.float()[ids[:, 1]]).to(dtype)
    assert torch.equal(got, want)


def _as_bits(values):
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _one_after_another(rows, dtype):
    """The sum of rows in their order, in float32 or wider, rounded once; of one row its very bits."""
    if len(rows) == 1:
        return rows[0]
    wide = dtype if dtype == torch.float64 else torch.float32
    total = rows[0].to(wide) if rows else torch.zeros(1, dtype=wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(dtype)


@pytest.mark.parametrize("width", [1, 7, 8, 24, 512, 520, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_number_of_summands(dtype, width, device):
    """0 to 9 ids in a row, at every place, with and without a feature; infinities, NaN, -0, subnormals."""
    table = torch.randn(40, width, dtype=torch.float64).to(dtype)
    table[3, ::5], table[4, ::7], table[5, ::3] = float("inf"), float("nan"), -0.0
    table[6] = torch.finfo(dtype).smallest_normal / 2
    table[7:9, ::4] = -0.0
    ids = torch.randint(1, 40, (90, 9))
    ids[torch.rand(ids.shape) < torch.arange(90)[:, None] % 10 / 9] = 0
    ids[:2], ids[2, :], ids[2, 4] = 0, 0, 5
    positions = torch.arange(0, 90, 4)
    features = torch.randn(len(positions), width).to(dtype)
    features[:3] = -0.0
    got = sx.ops.multistream_embed(
        ids.to(device),
        table.to(device),
        features=features.to(device),
        feature_positions=positions.to(device),
    ).cpu()
    for n in range(90):
        rows = [table[i] for i in ids[n].tolist() if i != 0] + [features[n // 4]] * (n % 4 == 0)
        want = _one_after_another(rows, dtype).expand(width)
        is_nan = torch.isnan(want)
        assert torch.equal(torch.isnan(got[n]), is_nan), n
        assert torch.equal(_as_bits(got[n])[~is_nan], _as_bits(want)[~is_nan]), n
        if dtype.itemsize == 2 and len(rows) > 1:  # of a NaN that was computed
            assert (_as_bits(got[n])[is_nan] == 0x7FFF).all(), n


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data):
    shape = (data.draw(st.integers(0, 40)), data.draw(st.integers(1, 6)))
    num_rows, width = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 70))
    pad_id = data.draw(st.integers(-2, 12))
    ids = torch.randint(
        0, num_rows, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    table = torch.randn(num_rows, width, dtype=torch.float64, requires_grad=True)
    out = sx.ops.multistream_embed(ids, table, pad_id=pad_id)
    want = reference.multistream_embed(ids, table, 99, [0] * shape[1], None) if shape[0] else out.detach() * 0
    if shape[0] and width and pad_id < num_rows:
        mask = (ids != pad_id)[..., None]
        want = (table[ids] * mask).sum(1)
    torch.testing.assert_close(out, want, check_stride=False)


def test_non_contiguous_inputs(device):
    table = torch.randn(9, 20, device=device).T
    ids = torch.randint(1, 20, (4, 6), device=device)[:, ::2]
    got = sx.ops.multistream_embed(ids, table)
    torch.testing.assert_close(got, table[ids].sum(1))
    values = torch.randn(8, 5, device=device).T
    ids = torch.tensor([1, 9, 0, 9, 2, 9, 1, 9, 0, 9], device=device)[::2]
    want = torch.zeros(3, 8, device=device).index_add(0, ids, values)
    torch.testing.assert_close(sx.ops.segment_sum(values, ids, 3), want)


def test_opcheck(device):
    table = torch.randn(20, 9, device=device, requires_grad=True)
    ids = make_ids(0).to(device)
    for rule in ((0, [], []), (-1, [0, 5, 10], [0.5, 1.0, 2.0])):
        opcheck(torch.ops.speechlm_ext.multistream_embed, (ids, table, *rule, None, None, False, False))
        values = torch.randn(17, 9, device=device, requires_grad=True)
        opcheck(torch.ops.speechlm_ext.scatter_sum, (values, ids, *rule, 20))


def test_gradients_of_gradients():
    ids = make_ids(0, num_rows=5)
    table = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

    def loss(t):
        return sx.ops.multistream_embed(ids, t, scale=[1.0, 2.0, -0.5]).pow(3)

    assert torch.autograd.gradgradcheck(loss, (table,))


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients(settings, device):
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), num_rows=6).to(device)
    table = torch.randn(20, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sx.ops.multistream_embed(ids, t, **options), (table,))


@pytest.mark.parametrize("num_streams", [1, 33, 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_as_many_streams_as_fit(num_streams, scaled, device):
    ids = torch.randint(0, 30, (21, num_streams), device=device)
    scale = [0.5 + s / 64 for s in range(num_streams)] if scaled else None
    table = torch.randn(30, 20, dtype=torch.float64, device=device, requires_grad=True)
    got = sx.ops.multistream_embed(ids, table, scale=scale)
    weight = torch.ones(num_streams) if scale is None else torch.tensor(scale)
    weight = (ids != 0).cpu() * weight.double()
    want = (table.cpu()[ids.cpu()] * weight[..., None]).sum(1)
    torch.testing.assert_close(got.cpu(), want)
    (ours,) = torch.autograd.grad(got.sum(), table)
    (theirs,) = torch.autograd.grad(want.sum(), table)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, dict(offsets=[0, 1, 2]), dict(scale=[1.0, 1.0, 1.0])])
def test_pads_are_exactly_zero_even_where_the_table_is_not_finite(options, device):
    table = torch.full((9, 4), float("nan"), device=device)
    table[5:] = 1.0
    table.requires_grad_()
    ids = torch.tensor([[0, 0, 0], [0, 5, 0]], device=device)
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


def test_compiles_and_exports():
    table, ids = torch.randn(20, 9, requires_grad=True), make_ids(0)
    compiled = torch.compile(sx.ops.multistream_embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (17, 5):
        out = compiled(ids[:rows], table)
        torch.testing.assert_close(out, sx.ops.multistream_embed(ids[:rows], table))
    (grad,) = torch.autograd.grad(out.sum(), table)
    torch.testing.assert_close(
        grad, torch.autograd.grad(sx.ops.multistream_embed(ids[:5], table).sum(), table)[0]
    )

    class Embed(torch.nn.Module):
        def forward(self, ids, table):
            return sx.ops.multistream_embed(ids, table, scale=[1.0, 2.0, 3.0])

    exported = torch.export.export(Embed(), (ids, table.detach()))
    torch.testing.assert_close(exported.module()(ids, table.detach()), Embed()(ids, table.detach()))


def test_meta_tensors_and_autocast():
    ids = make_ids(0)
    out = sx.ops.multistream_embed(ids.to("meta"), torch.empty(20, 9, device="meta", dtype=torch.bfloat16))
    assert out.shape == (17, 9) and out.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sx.ops.multistream_embed(ids, torch.randn(20, 9)).dtype == torch.float32


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


def test_an_id_outside_the_table_is_an_index_error(device):
    ids = torch.tensor([[1, 2], [3, 20], [-1, 4]], device=device)
    with pytest.raises(IndexError, match=r"ids\[1, 1\] \(row 1, stream 1\) is 20") as caught:
        sx.ops.multistream_embed(ids, torch.randn(20, 4, device=device), check_ids=True)
    assert isinstance(caught.value, SpeechLMError)
    with pytest.raises(ValueError, match="at most 64 streams"):
        sx.ops.multistream_embed(torch.zeros(1, 65, dtype=torch.int64), torch.randn(20, 4))
