"""A table and a head on two processes that hold parts of them learn what they learn on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from python_tests.training.partitioned import (
    PRETRAINED,
    SEED,
    STEPS,
    VARIANTS,
    Small,
    Tied,
    batch,
    fill,
    fill_and_step,
    sparse_ids,
    values,
)
from speechlm_ext.model.embedding import MultiStreamEmbedding

Found = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def found(runs: Path) -> Found:
    """What each of two ranks sees."""
    return [load_file(runs / f"partitioned.{rank}") for rank in (0, 1)]


def test_partitioned_table_is_filled_and_trained_as_a_whole_one(found: Found) -> None:
    model = Tied()

    def step(loss: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss.backward()
        optimizer.step()

    want = fill_and_step(model, lambda: model, step, SEED)
    assert torch.equal(want["filled"][10:30], PRETRAINED) and not want["filled"][0].any()
    assert not torch.equal(want["stepped"], want["filled"])
    for rank in (0, 1):
        assert torch.equal(found[rank]["filled"], want["filled"])
        torch.testing.assert_close(found[rank]["loss"], want["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[rank]["stepped"], want["stepped"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_learn_what_one_does(stage: int, variant: int, found: Found) -> None:
    """One process takes the mean of both ranks' losses, as DeepSpeed does with their gradients."""
    model = Small(*VARIANTS[variant])
    fill(model)
    before = values(model, "before")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        both = torch.stack([model(*batch(rank, step)) for rank in (0, 1)])
        both.mean().backward()
        optimizer.step()
        losses.append(both.detach())
    for rank in (0, 1):
        theirs = found[rank][f"{stage}.{variant}.losses"]
        torch.testing.assert_close(theirs, torch.stack(losses)[:, rank], rtol=1e-5, atol=0)
    assert (model.head.weight is model.embedding.weight) == VARIANTS[variant][0]
    for key, want in values(model, f"{stage}.{variant}").items():
        assert not torch.equal(want, before[key.replace(f"{stage}.{variant}", "before")])
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][key], want, rtol=1e-5, atol=1e-6)


def test_a_sparse_gradient_needs_a_run_without_zero(found: Found) -> None:
    """Stages 1 to 3 put all gradients into one flat buffer; without ZeRO the ranks' sparse gradients are averaged."""
    table = MultiStreamEmbedding(40, 8)
    table.load_text_rows(torch.ones(39, 8), 1, 40)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    torch.stack([table(sparse_ids(rank)).square().sum() for rank in (0, 1)]).mean().backward()
    optimizer.step()
    for rank in (0, 1):
        assert {key for key in found[rank] if key.startswith("sparse")} == {"sparse.0"}
        torch.testing.assert_close(found[rank]["sparse.0"], table.weight.detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=str)
def test_the_head_itself_may_be_checkpointed(variant: int, reentrant: bool) -> None:
    """Its forward runs twice then, and its gradients are those of a plain call."""
    model = Small(*VARIANTS[variant])
    fill(model)
    _, labels, weight = batch(0, 0)
    hidden = torch.randn(labels.shape[0], 8, requires_grad=True)
    parts = [hidden, *model.head.parameters()]

    def loss(h: torch.Tensor) -> torch.Tensor:
        return model.head(h, labels, weight).loss_sum

    want = torch.autograd.grad(loss(hidden) * 3, parts)
    for part in parts:
        part.grad = None
    (checkpoint(loss, hidden, use_reentrant=reentrant) * 3).backward()
    for part, expected in zip(parts, want, strict=True):
        torch.testing.assert_close(part.grad, expected)
