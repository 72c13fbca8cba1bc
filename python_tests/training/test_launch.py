"""Several processes of a run: torchrun gets the run's own settings, and its failure is one error."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from python_tests.training.tiny import config
from speechlm_ext.errors import TrainingError
from speechlm_ext.training import run_train
from speechlm_ext.training.launch import init_distributed


def test_a_run_of_two_processes_is_torchruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(
        tmp_path / "run", tmp_path / "tokens", {"processes": 2, "data": {"delays": (0, 1, 2, 3)}}
    )
    commands = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        found = yaml.safe_load(Path(command[-1]).read_text("utf-8"))
        assert found == json.loads(json.dumps(asdict(settings))) and found["data"]["delays"] == [0, 1, 2, 3]
        return SimpleNamespace(returncode=3)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(TrainingError, match="exit code 3; its message is above; no checkpoint is in .*run"):
        run_train(settings)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert commands[0][1:-1] == [*torchrun, "-m", "speechlm_ext.cli", "train", "--config"]


def test_a_single_process_leaves_its_children_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a training run started by them would bind to the same port, or take itself for one of several."""
    names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    rank, world, _ = init_distributed()
    assert (rank, world) == (0, 1) and not names & set(os.environ)
