"""Runs whose numbers are not finite any more: they end on every rank, and keep their good checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from python_tests.training.runs import DIVERGING, errors, weights


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("world, way", [(world, way) for world, ways in DIVERGING.items() for way in ways])
def test_numbers_that_are_not_finite_are_not_saved(runs: Path, world: int, way: str, kind: str) -> None:
    """Every rank ends the run (else this would wait for ever), all of before is kept, and the message is true."""
    name = f"{kind}-{world}-{way}"
    error, folder = errors(runs, world)[name], runs / name / "checkpoints"
    found = sorted(p.name for p in folder.glob("step-*"))
    step = 2 if kind == "loss" else 5
    assert error.startswith(f"TrainingError: training stopped at step {step}: the loss is")
    assert f"The newest checkpoint with finite values is {folder / found[-1]};" in error
    # The steps of the interval until then are saved, and older checkpoints stay although keep_checkpoints is 1.
    assert found == (["step-00000001"] if kind == "loss" else ["step-00000003", "step-00000004"])
    for checkpoint in found:
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert all(bool(v.isfinite().all()) for v in load_file(folder / checkpoint / file).values())


def test_ruined_weights_do_not_replace_good_ones(runs: Path) -> None:
    """Those of step 4 are finite, 1e30 times too large, and saved with one checkpoint to keep; the error names the one
    before it, from which the run ends as if nothing had been."""
    error, folder = errors(runs, 1)["ruined"], runs / "ruined" / "checkpoints"
    assert error.startswith("TrainingError: training stopped at step 5: ")
    assert f"finite values is {folder / 'step-00000004'}; the same command resumes from it" in error
    assert f"resume from the one before it with --resume {folder / 'step-00000003'}. " in error
    ours, theirs = weights(runs / "ruined"), weights(runs / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
