"""MultiStreamEmbedding on two processes that hold half of the table each, from its construction on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")

HERE = Path(__file__).parent


def test_partitioned_table_is_filled_and_trained_as_a_whole_one(tmp_path: Path) -> None:
    sys.path.insert(0, str(HERE))
    from partitioned import PRETRAINED, SEED, Tied, run

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(HERE / "partitioned.py"), str(tmp_path / "found")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    model = Tied()

    def step(loss: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss.backward()
        optimizer.step()

    want = run(model, lambda: model, step, SEED)
    assert torch.equal(want["filled"][10:30], PRETRAINED) and not want["filled"][0].any()
    assert not torch.equal(want["stepped"], want["filled"])
    for rank in (0, 1):
        found = load_file(tmp_path / f"found.{rank}")
        assert torch.equal(found["filled"], want["filled"])
        torch.testing.assert_close(found["loss"], want["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["stepped"], want["stepped"], rtol=1e-6, atol=1e-7)
