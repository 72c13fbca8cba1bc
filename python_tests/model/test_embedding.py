"""MultiStreamEmbedding: the module against the op, and how its rows are filled."""

from __future__ import annotations

import pytest
import torch

import speechlm_ext as sx
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.model.embedding import load_rows
from speechlm_ext.ops.multistream_embed import reference


@pytest.mark.parametrize(
    "options", [{}, dict(pad_id=3), dict(offsets=[0, 5, 10], scale=[1.0, -0.5, 2.0]), dict(sparse=True)]
)
def test_forward_is_the_op(options: dict) -> None:
    """Values and gradients against the reference, for ids with leading axes and features among them."""
    module = sx.MultiStreamEmbedding(20, 6, dtype=torch.float64, **options)
    ids = torch.randint(0, 8, (2, 5, 3))
    features = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([9, 0, 6])
    got = module(ids, features, positions)
    rule = options.get("pad_id", 0), options.get("offsets"), options.get("scale")
    want = reference.multistream_embed(ids.view(-1, 3), module.weight, *rule, features, positions)
    assert got.shape == (2, 5, 6)
    torch.testing.assert_close(got, want.view(2, 5, 6))
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, (module.weight, features), grad)
    theirs = torch.autograd.grad(want, (module.weight, features), grad.view(10, 6))
    assert ours[0].is_sparse == bool(options.get("sparse"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.to_dense(), b)
    assert torch.equal(module(ids[0, 0]), module(ids)[0, 0])


def test_first_draw_and_repr() -> None:
    module = sx.MultiStreamEmbedding(4000, 16, std=0.3)
    assert not module.weight[0].any() and abs(float(module.weight.detach()[1:].std()) - 0.3) < 0.01
    module.reset_parameters(0.1, torch.Generator().manual_seed(1))
    again = sx.MultiStreamEmbedding(4000, 16)
    again.reset_parameters(0.1, torch.Generator().manual_seed(1))
    assert torch.equal(module.weight, again.weight) and not again.weight[0].any()
    assert list(module.state_dict()) == ["weight"]
    assert "4000, 16, pad_id=0)" in repr(module)
    full = sx.MultiStreamEmbedding(9, 2, pad_id=-1, offsets=[0, 4], scale=[1, 2], sparse=True)
    assert "9, 2, pad_id=-1, offsets=[0, 4], scale=[1.0, 2.0], sparse=True)" in repr(full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_have_the_pretrained_scale(dtype: torch.dtype) -> None:
    """A standard deviation: of 0.04 the variance would be 0.0016. Column means that differ are kept."""
    pretrained = (torch.randn(500, 64) * 0.04 + torch.randn(64) * 0.1).to(dtype)
    module = sx.MultiStreamEmbedding(9000, 64, dtype=dtype)
    module.load_text_rows(pretrained, 200, 650, generator=torch.Generator().manual_seed(5))
    weight = module.weight.detach()
    assert torch.equal(weight[200:650], pretrained[:450]) and not weight[0].any()
    new = torch.cat([weight[1:200], weight[650:]]).float()
    assert abs(float(new.std() / pretrained.float().std()) - 1) < 0.03
    deviation = (pretrained.float() - pretrained.float().mean(0)).std()
    assert abs(float((new - new.mean(0)).std() / deviation) - 1) < 0.02
    assert float((new.mean(0) - pretrained.float().mean(0)).abs().max()) < 0.005


def test_new_rows_are_the_same_under_a_generator() -> None:
    pretrained = torch.randn(50, 8)

    def filled(seed: int, dtype: torch.dtype) -> torch.Tensor:
        module = sx.MultiStreamEmbedding(5000, 8, dtype=dtype)
        torch.randn(seed)  # the global generator has no part in it
        module.load_text_rows(pretrained, 10, 60, generator=torch.Generator().manual_seed(seed))
        return module.weight.detach()

    first = filled(1, torch.float32)
    assert torch.equal(first, filled(1, torch.float32)) and not torch.equal(first, filled(2, torch.float32))
    assert torch.equal(first.bfloat16(), filled(1, torch.bfloat16))


def test_a_text_row_that_is_the_pad_is_zero_and_offsets_have_no_pad_row() -> None:
    pretrained = torch.ones(5, 4)
    module = sx.MultiStreamEmbedding(5, 4, pad_id=2)
    module.load_text_rows(pretrained, 0, 5)
    assert module.weight[:, 0].tolist() == [1, 1, 0, 1, 1]
    stacked = sx.MultiStreamEmbedding(5, 4, pad_id=2, offsets=[0, 0])
    stacked.load_text_rows(pretrained, 0, 5)
    assert stacked.weight[:, 0].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("pretrained", "start", "end", "message"),
    [
        (torch.zeros(5, 3), 0, 5, r"float32 \[5, 3\]; expected a float table of width 4"),
        (torch.zeros(5, 4, dtype=torch.int64), 0, 5, "expected a float table"),
        (torch.zeros(5, 4), 0, 6, "rows 0 to 6 of a table of 9 rows .* of 5 rows"),
        (torch.zeros(50, 4), 5, 10, "rows 5 to 10 of a table of 9 rows"),
        (torch.zeros(5, 4), 3, 2, "rows 3 to 2"),
    ],
)
def test_refuses_rows_that_do_not_fit(pretrained, start, end, message) -> None:  # type: ignore[no-untyped-def]
    weight = torch.ones(9, 4)
    with pytest.raises(CheckpointError, match=message):
        load_rows(weight, pretrained, start, end)
    assert torch.equal(weight, torch.ones(9, 4))


def test_refuses_settings_that_make_no_table() -> None:
    with pytest.raises(ConfigError, match="num_embeddings and embedding_dim must be >= 1, got 0 and 4"):
        sx.MultiStreamEmbedding(0, 4)
    with pytest.raises(ConfigError, match="offsets has 2 values and scale has 1"):
        sx.MultiStreamEmbedding(9, 4, offsets=[0, 4], scale=[1.0])


def test_compiles_and_exports() -> None:
    module = sx.MultiStreamEmbedding(20, 6)
    ids, features, positions = torch.randint(0, 20, (2, 5, 3)), torch.randn(2, 6), torch.tensor([7, 1])
    want = module(ids, features, positions)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, features, positions), want)
    exported = torch.export.export(module, (ids, features, positions)).module()
    assert torch.equal(exported(ids, features, positions), want)


def test_text_rows_may_be_rows_of_the_table_itself() -> None:
    embedding = sx.MultiStreamEmbedding(9, 8)
    before = embedding.weight.detach().clone()
    embedding.load_text_rows(embedding.weight.detach()[2:6], 1, 5)
    assert torch.equal(embedding.weight[1:5], before[2:6])


def test_one_pretrained_row_tells_no_scale() -> None:
    embedding = sx.MultiStreamEmbedding(9, 8)
    before = embedding.weight.detach().clone()
    for rows in (0, 1):
        with pytest.raises(CheckpointError, match=f"which {rows} rows do not define"):
            embedding.load_text_rows(torch.randn(rows, 8), 3, 3 + rows)
    assert torch.equal(embedding.weight, before)
