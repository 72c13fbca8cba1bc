"""MultiStreamHead on two processes under ZeRO 1, 2 and 3 learns what it learns on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from partitioned_head import STEPS, VARIANTS, Small, batch, fill, values  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two ranks sees."""
    out = tmp_path_factory.mktemp("zero") / "found"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(HERE / "partitioned_head.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(f"{out}.{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_learn_what_one_does(
    stage: int, variant: int, found: list[dict[str, torch.Tensor]]
) -> None:
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
