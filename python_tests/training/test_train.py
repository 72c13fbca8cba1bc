"""Training: the loss falls, runs are exact under resume, and the number of processes does not change the result.

All runs of one process share its start, since loading DeepSpeed takes longer than six tiny steps.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


def command(tokens: Path, runs: list[dict], results: Path, world: int = 1) -> list[str]:
    launch = (
        [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    )
    runs = [{**run, "run_dir": str(run["run_dir"])} for run in runs]
    return [sys.executable, *launch, str(HERE / "drive.py"), str(tokens), json.dumps(runs), str(results)]


def drive(tokens: Path, runs: list[dict], world: int = 1) -> list[str | None]:
    """Train in a process of its own (or several), as a user would; each run's error or None."""
    results = tokens.parent / "results.json"
    results.unlink(missing_ok=True)
    done = subprocess.run(
        command(tokens, runs, results, world),
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(last(run) / "model.safetensors")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(HERE))
    from tiny import make_tokens

    return make_tokens(tmp_path_factory.mktemp("tokens") / "train")


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run that the tests compare: uninterrupted ones, and ones that were stopped after step 3 and went on."""
    root = tmp_path_factory.mktemp("runs")
    ways = {"plain": {}, "bf16": {"precision": "bf16"}, **{f"zero{s}": {"zero_stage": s} for s in (1, 2, 3)}}
    plan: list[dict] = [{"run_dir": root / "falls", "budget": 4096, "steps": 12}]
    for name, changes in ways.items():
        plan.append({"run_dir": root / name, **changes})
        plan.append({"run_dir": root / f"{name}-parted", **changes, "stop_at": 3})
        plan.append({"run_dir": root / f"{name}-parted", **changes})
    plan.append({"run_dir": root / "two-packs", "accumulation": 2})
    plan += [
        {"run_dir": root / f"whole-{t}", "accumulation": 2, "steps": 3, "tie_head": t} for t in (False, True)
    ]
    results = drive(tokens, plan)
    assert results == [None] * len(results)
    both = [{"run_dir": root / f"two-processes-{s}", "zero_stage": s, "steps": 3} for s in (0, 1, 2, 3)]
    both += [{"run_dir": root / f"elastic-{s}", "zero_stage": s, "stop_at": 3} for s in (1, 3)]
    both += [
        {"run_dir": root / f"partitioned-{t}", "zero_stage": 3, "partition": True, "steps": 3, "tie_head": t}
        for t in (False, True)
    ]
    results = drive(tokens, both, world=2)
    assert results == [None] * len(results)
    return root


def test_loss_falls(runs: Path) -> None:
    """One pack holds all the data, so each step sees the same: the loss must fall at every step."""
    values = losses(runs / "falls")
    assert len(values) == 12 and values[-1] < 0.95 * values[0]
    assert all(b < a for a, b in zip(values[2:], values[3:], strict=False))


def test_checkpoint_is_complete(runs: Path) -> None:
    folder = last(runs / "plain")
    assert folder.name == "step-00000006"
    expected = {
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "token_layout.json",
        "trainer_state.json",
    }
    assert {p.name for p in folder.iterdir()} >= expected
    assert json.loads((folder / "trainer_state.json").read_text())["packs_consumed"] == 6
    saved = yaml.safe_load((runs / "plain" / "config.yaml").read_text())
    assert saved["optimizer"]["lr"] == 3e-3 and saved["data"]["budget"] == 128


@pytest.mark.parametrize("way", ["plain", "bf16", "zero1", "zero2", "zero3"])
def test_resume_is_exact(runs: Path, way: str) -> None:
    """Stopped and resumed: the same losses to the last digit, the same weights to the last bit."""
    assert len(losses(runs / way)) == 6
    assert losses(runs / f"{way}-parted") == losses(runs / way)
    ours, theirs = weights(runs / f"{way}-parted"), weights(runs / way)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bf16_keeps_fp32_masters(runs: Path) -> None:
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights(runs / "bf16").values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_learn_the_same(runs: Path, stage: int) -> None:
    """Two processes with one pack each equal one process with two packs a step, for every ZeRO stage."""
    ours, theirs = losses(runs / f"two-processes-{stage}"), losses(runs / "two-packs")[:3]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=0)


@pytest.mark.parametrize("tie_head", [False, True])
def test_partitioned_tables_learn_the_same(runs: Path, tie_head: bool) -> None:
    """ZeRO-3 with every parameter partitioned: losses and weights as of one process, whose table is whole."""
    ours, theirs = runs / f"partitioned-{tie_head}", runs / f"whole-{tie_head}"
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(theirs)), rtol=2e-5, atol=0)
    found, wanted = weights(ours), weights(theirs)
    assert set(found) == set(wanted) and ("head.weight" in wanted) == (not tie_head)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_resume_on_another_number_of_processes(runs: Path, tokens: Path) -> None:
    """Three steps on two processes with ZeRO, then three on one without: as six on one."""
    elastic = [runs / f"elastic-{stage}" for stage in (1, 3)]
    assert drive(tokens, [{"run_dir": run, "accumulation": 2} for run in elastic]) == [None, None]
    for run in elastic:
        ours, theirs = losses(run), losses(runs / "two-packs")
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


def test_kill_in_the_middle_and_resume(runs: Path, tokens: Path, tmp_path: Path) -> None:
    """SIGKILL after step 4 was logged: the run goes on from step 3 and ends as if nothing had happened."""
    process = subprocess.Popen(
        command(tokens, [{"run_dir": tmp_path, "slow": 1.0}], tmp_path / "results.json"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) >= 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(log.read_text().splitlines()) in (4, 5)
    assert last(tmp_path).name == "step-00000003"
    with open(log, "a") as file:  # a line that was cut in the middle must not confuse the resumed run
        file.write('{"step": 5, "lo')
    assert drive(tokens, [{"run_dir": tmp_path}]) == [None]
    assert losses(tmp_path) == losses(runs / "plain")


def test_refuses_what_it_cannot_resume(runs: Path, tokens: Path, tmp_path: Path) -> None:
    good = last(runs / "plain")
    (tmp_path / "empty").mkdir()
    shutil.copytree(good, tmp_path / "damaged")
    (tmp_path / "damaged" / "optimizer.safetensors").write_bytes(b"\x10\0\0\0")
    new = tmp_path / "new"
    cases = {
        "does not exist": {"resume": str(tmp_path / "nowhere")},
        "not a training checkpoint": {"resume": str(tmp_path / "empty")},
        "another pack plan": {"resume": str(good), "budget": 140},
        "does not fit the model": {"resume": str(good), "hidden_size": 32},
        "damaged or truncated": {"resume": str(tmp_path / "damaged")},
        "already holds": {"resume": "none", "run_dir": runs / "plain"},
    }
    errors = drive(tokens, [{"run_dir": new, **changes} for changes in cases.values()])
    for expected, error in zip(cases, errors, strict=True):
        assert error is not None and expected in error, (expected, error)
    assert not list(new.glob("checkpoints/*"))
