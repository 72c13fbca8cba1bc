"""Continuous features in multistream_embed: against the reference in float64, on every device."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import speechlm_ext as sx
from python_tests.ops.multistream_embed.cases import DTYPES, SETTINGS, assert_no_worse, make_ids, rule_of
from speechlm_ext.errors import SpeechLMError
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.multistream_embed import reference

POSITIONS = [16, 4, 0, 9, 7]  # row 4 has pads alone; not in order, first and last row among them


def embed(ids, table, features, positions, **options):
    return sx.ops.multistream_embed(ids, table, features=features, feature_positions=positions, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_matches_reference(settings, id_dtype, dtype, device):
    options = SETTINGS[settings]
    rule = rule_of(options)
    ids = make_ids(rule[0], id_dtype).to(device)
    table = torch.randn(20, 9, device=device).to(dtype)
    features = torch.randn(5, 9, device=device).to(dtype)
    positions = torch.tensor(POSITIONS, dtype=id_dtype, device=device)
    got = embed(ids, table, features, positions, **options)
    assert got.dtype == dtype
    exact = reference.multistream_embed(ids, table.double(), *rule, features.double(), positions)
    assert_no_worse(got, reference.multistream_embed(ids, table, *rule, features, positions), exact)
    assert torch.equal(got[4], features[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 37, 64, 200])
def test_rounded_once(width, dtype, device):
    """The feature joins the float32 sum; adding it to the rounded sum would give something else."""
    ids = torch.randint(1, 30, (60, 2), device=device)
    table, features = (torch.randn(n, width, device=device).to(dtype) for n in (30, 60))
    positions = torch.randperm(60).to(device)
    got = embed(ids, table, features, positions)
    wide = table.float()[ids[:, 0]] + table.float()[ids[:, 1]]
    rounded_twice = wide.to(dtype).index_add(0, positions, features)
    wide.index_add_(0, positions, features.float())
    assert torch.equal(got, wide.to(dtype))
    assert not torch.equal(got, rounded_twice)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_numerically(settings):
    """First and second derivatives, of the table and of the features."""
    options = SETTINGS[settings]
    ids = make_ids(options.get("pad_id", 0), num_rows=6)
    table = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(t, f):
        return embed(ids, t, f, torch.tensor([5, 0, 4]), **options)

    assert torch.autograd.gradcheck(run, (table, features))
    assert torch.autograd.gradgradcheck(lambda t, f: run(t, f).pow(3), (table, features))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(settings, sparse, device):
    options = SETTINGS[settings]
    rule = rule_of(options)
    ids, positions = make_ids(rule[0]).to(device), torch.tensor(POSITIONS, device=device)
    table = torch.randn(20, 3, dtype=torch.float64, device=device, requires_grad=True)
    features = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    grad = torch.randn(17, 3, dtype=torch.float64, device=device)
    embed(ids, table, features, positions, sparse=sparse, **options).backward(grad)
    assert torch.equal(features.grad, grad[positions])
    (want,) = torch.autograd.grad(reference.multistream_embed(ids, table, *rule), table, grad)
    torch.testing.assert_close(table.grad.to_dense(), want)


def test_features_alone_have_a_gradient(device):
    ids, table = make_ids(0).to(device), torch.randn(20, 4, device=device)
    features = torch.randn(2, 4, device=device, requires_grad=True)
    embed(ids, table, features, torch.tensor([3, 1], device=device)).pow(2).sum().backward()
    torch.testing.assert_close(
        features.grad, 2 * (features + sx.ops.multistream_embed(ids, table)[[3, 1]]).detach()
    )


def test_other_float_dtypes_and_autocast(device):
    """As F.embedding: the table's dtype comes out, under autocast too; each gradient has its tensor's dtype."""
    ids, positions = make_ids(0).to(device), torch.tensor(POSITIONS, device=device)
    for table_dtype, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        table = torch.randn(20, 8, device=device).to(table_dtype).requires_grad_()
        features = torch.randn(5, 8, device=device).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = embed(ids, table, features, positions)
        want = embed(ids, table, features.detach().to(table_dtype), positions)
        assert out.dtype == table_dtype and torch.equal(out, want)
        out.sum().backward()
        assert table.grad.dtype == table_dtype and features.grad.dtype == dtype
        assert torch.equal(features.grad, torch.ones_like(features))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(dtype):
    ids = torch.randint(0, 20, (900, 3))
    table, features = torch.randn(20, 107).to(dtype), torch.randn(700, 107).to(dtype)
    positions = torch.randperm(900)[:700]
    before, found = torch.get_num_threads(), {}
    try:
        for name in native.simd_available():
            native.use_simd(name)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found[name, threads] = [
                    embed(ids, table, features, positions, scale=scale) for scale in (None, [0.3, -1.7, 1e-3])
                ]
    finally:
        native.use_simd("")
        torch.set_num_threads(before)
    first = found["generic", 1]
    for name, other in found.items():
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), name


@pytest.mark.parametrize("num_streams", [1, 64])
@pytest.mark.parametrize("width", [0, 1, 4, 72])
def test_shapes_at_the_edge(width, num_streams, device):
    ids = torch.randint(1, 9, (7, num_streams), device=device)
    table = torch.randn(9, width, dtype=torch.float64, device=device)
    features = torch.randn(7, width, dtype=torch.float64, device=device)
    positions = torch.randperm(7).to(device)
    for count in (0, 1, 7):
        got = embed(ids, table, features[:count], positions[:count])
        want = table[ids].sum(1).index_add(0, positions[:count], features[:count])
        torch.testing.assert_close(got, want)
    nothing = embed(ids[:0], table, features[:0], positions[:0])
    assert nothing.shape == (0, width)


def test_non_contiguous_inputs(device):
    ids = torch.randint(1, 9, (6, 6), device=device)[:, ::2]
    table, features = torch.randn(5, 9, device=device).T, torch.randn(5, 8, device=device).T[::2]
    positions = torch.tensor([5, 1, 0, 1, 2, 1, 3, 1], device=device)[::2]
    got = embed(ids, table, features, positions)
    torch.testing.assert_close(got, table[ids].sum(1).index_add(0, positions, features))


def test_a_table_row_of_nan_stays_out_of_a_row_of_pads(device):
    table = torch.full((9, 4), float("nan"), device=device)
    features = torch.randn(1, 4, device=device)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    got = embed(ids, table, features, torch.tensor([1], device=device))
    assert torch.equal(got, torch.cat([torch.zeros(1, 4, device=device), features]))


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        ([1, 17], IndexError, r"feature_positions\[1\] is 17; the output has rows 0 to 16"),
        ([-1, 3], IndexError, r"feature_positions\[0\] is -1"),
        ([2**32, 3], IndexError, r"feature_positions\[0\] is 4294967296"),
        ([17, -1], IndexError, r"feature_positions\[0\] is 17"),
        ([3, 3], ValueError, r"feature_positions\[1\] and feature_positions\[0\] are both 3"),
    ],
)
def test_positions_are_checked(positions, kind, message, device):
    arguments = (make_ids(0).to(device), torch.randn(20, 4, device=device), torch.randn(2, 4, device=device))
    with pytest.raises(kind, match=message) as caught:
        embed(*arguments, torch.tensor(positions, device=device), check_ids=True)
    assert isinstance(caught.value, SpeechLMError)


def test_unchecked_positions_of_a_gpu_write_nothing_outside(device, request):
    ids, table = make_ids(0).to(device), torch.randn(20, 4, device=device)
    features = torch.randn(5, 4, device=device, requires_grad=True)
    positions = torch.tensor([17, 3, -1, 3, 2**40], device=device)
    if request.node.callspec.params["device"] == "cpu":  # which checks without being asked
        with pytest.raises(IndexError, match=r"feature_positions\[0\] is 17"):
            embed(ids, table, features, positions)
        return
    got = embed(ids, table, features, positions)
    want = sx.ops.multistream_embed(ids, table).index_add(0, torch.tensor([3], device=device), features[3:4])
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert features.grad[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_compiles_exports_and_has_a_fake(device):
    ids, positions = make_ids(0).to(device), torch.tensor(POSITIONS, device=device)
    table = torch.randn(20, 9, device=device, requires_grad=True)
    features = torch.randn(5, 9, device=device, requires_grad=True)
    for rule in ((0, [], []), (-1, [0, 5, 10], [0.5, 1.0, 2.0])):
        arguments = (ids, table, *rule, features, positions, False, False)
        opcheck(torch.ops.speechlm_ext.multistream_embed, arguments)
    meta = embed(*(t.detach().to("meta") for t in (ids, table, features, positions)))
    assert meta.shape == (17, 9) and meta.is_meta

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (5, 3):
        arguments = (ids, table, features[:count], positions[:count])
        grad = torch.randn(17, 9, device=device)
        got = torch.autograd.grad(compiled(*arguments), (table, features), grad)
        want = torch.autograd.grad(embed(*arguments), (table, features), grad)
        assert torch.equal(compiled(*arguments), embed(*arguments))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    class Embed(torch.nn.Module):
        def forward(self, ids, table, features, positions):
            return embed(ids, table, features, positions, scale=[1.0, 2.0, 3.0])

    arguments = (ids, table.detach(), features.detach().bfloat16(), positions.int())
    exported = torch.export.export(Embed(), arguments).module()
    assert torch.equal(exported(*arguments), Embed()(*arguments))


@pytest.mark.parametrize(
    ("features", "positions", "message"),
    [
        (torch.zeros(2, 4), None, "belong together; feature_positions is None"),
        (None, torch.tensor([1, 2]), "belong together; features is None"),
        (torch.zeros(2, 5), torch.tensor([1, 2]), r"features must be float \[M, 4\], as wide as the table"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.tensor([1, 2]), "features must be float"),
        (torch.zeros(2, 4), torch.tensor([1, 2, 3]), r"feature_positions must be int32 or int64 \[2\]"),
        (torch.zeros(2, 4), torch.tensor([1.0, 2.0]), "feature_positions must be int32 or int64"),
        (
            torch.zeros(2, 4, device="meta"),
            torch.tensor([1, 2]),
            "features is .* on meta but table is on cpu",
        ),
    ],
)
def test_rejects_bad_features(features, positions, message):
    with pytest.raises(ValueError, match=message):
        embed(make_ids(0), torch.randn(20, 4), features, positions)
