"""Training: the loss falls, runs are exact under resume, and the number of processes does not change the result.

All runs of one process share its start, since loading DeepSpeed takes longer than six tiny steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.training.train import build_model

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


def norms(run_dir: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


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
    """Every run that the tests compare: uninterrupted ones, ones that were stopped after step 3 and went on, and ones
    that had to end. Those that go on with what others left come last."""
    root = tmp_path_factory.mktemp("runs")
    both = [{"run_dir": root / f"two-processes-{s}", "zero_stage": s, "steps": 3} for s in (0, 1, 2, 3)]
    both += [{"run_dir": root / f"elastic-{s}", "zero_stage": s, "stop_at": 3} for s in (1, 3)]
    both += [
        {"run_dir": root / f"partitioned-{t}", "zero_stage": 3, "partition": True, "steps": 3, "tie_head": t}
        for t in (False, True)
    ]
    with killed(root / "killed", tokens):
        # Otherwise a rank without the checkpoint would begin anew while the others go on.
        unseen = {"run_dir": root / "elastic-1", "zero_stage": 1, "unseen": True}
        results = drive(tokens, [*both, *diverging(root, 2), unseen], world=2)
    assert results[: len(both)] == [None] * len(both)
    (root / "2.json").write_text(json.dumps(results[len(both) :]))

    ways = {"plain": {}, "bf16": {"precision": "bf16"}, **{f"zero{s}": {"zero_stage": s} for s in (1, 2, 3)}}
    plan: list[dict] = [{"run_dir": root / "falls", "budget": 4096, "steps": 12}]
    for name, changes in ways.items():
        plan.append({"run_dir": root / name, **changes})
        plan.append({"run_dir": root / f"{name}-parted", **changes, "stop_at": 3})
        plan.append({"run_dir": root / f"{name}-parted", **changes})
    kept = {"save_every": 1, "keep_checkpoints": 2}
    plan.append({"run_dir": root / "two-packs", "accumulation": 2, **kept})
    # Lines after steps 2, 4, 6 and a checkpoint after 3: the second line begins before it and ends behind it.
    plan.append({"run_dir": root / "lines-parted", "log_every": 2, "stop_at": 3})
    plan.append({"run_dir": root / "lines-parted", "log_every": 2})
    plan += [
        {"run_dir": root / f"whole-{t}", "accumulation": 2, "steps": 3, "tie_head": t} for t in (False, True)
    ]
    plan += [{"run_dir": root / f"elastic-{s}", "accumulation": 2} for s in (1, 3)]
    plan.append({"run_dir": root / "killed"})
    plan.append({"run_dir": root / "ruined", "stop_at": 3})
    good = root / "ruined" / "checkpoints" / "step-00000003"
    huge = {"optimizer": {"lr": 1e30}, "save_every": 1, "keep_checkpoints": 1, "log_every": 10}
    ruined = [{"run_dir": root / "ruined", **huge}, {"run_dir": root / "ruined", "resume": str(good)}]
    results = drive(tokens, [*plan, *diverging(root, 1), *refused(root).values(), *ruined])
    assert results[: len(plan)] == [None] * len(plan)
    (root / "1.json").write_text(json.dumps(results[len(plan) :]))
    return root


@contextlib.contextmanager
def killed(run_dir: Path, tokens: Path) -> Iterator[None]:
    """SIGKILL to a run after its step 4 was logged; it runs beside the block, and slowly."""
    process = subprocess.Popen(
        command(tokens, [{"run_dir": run_dir, "slow": 1.0}], run_dir.with_suffix(".json")),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = run_dir / "log.jsonl"

    def kill() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (log.is_file() and log.read_bytes().count(b"\n") >= 4):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()
    process.wait()
    shutil.copytree(run_dir, run_dir.with_name("killed-then"), symlinks=True)
    (run_dir / "checkpoints" / ".incomplete-step-00000009").mkdir()
    with open(log, "a") as file:  # a line that was cut in the middle must not confuse the resumed run
        file.write('{"step": 5, "lo')


def refused(root: Path) -> dict[str, dict]:
    """Runs that cannot be begun, by a part of their error."""
    good = root / "two-processes-0" / "checkpoints" / "step-00000003"
    bad = {name: root / name for name in ("empty", "damaged", "flipped", "old")}
    if not bad["empty"].exists():
        bad["empty"].mkdir()
        for name in ("damaged", "flipped", "old"):
            shutil.copytree(good, bad[name])
        (bad["damaged"] / "optimizer.safetensors").write_bytes(b"\x10\0\0\0")
        flipped = bytearray((good / "model.safetensors").read_bytes())
        flipped[-2] ^= 1
        (bad["flipped"] / "model.safetensors").write_bytes(flipped)
        # As an older version would have saved it.
        (bad["old"] / "digests.json").unlink()
        broken = {name: value / 0 for name, value in load_file(good / "model.safetensors").items()}
        save_file(broken, bad["old"] / "model.safetensors")
    cases = {
        "does not exist": {"resume": str(root / "nowhere")},
        "not a training checkpoint": {"resume": str(bad["empty"])},
        "another pack plan": {"resume": str(good), "budget": 140},
        "does not fit the model": {"resume": str(good), "hidden_size": 32},
        "optimizer.safetensors is damaged or truncated": {"resume": str(bad["damaged"])},
        "damaged or truncated; use an older": {"resume": str(bad["damaged"]), "verify": False},
        "model.safetensors is damaged or truncated": {"resume": str(bad["flipped"])},
        "is not finite. The run had diverged": {"resume": str(bad["old"])},
        "already holds": {"resume": "none", "run_dir": root / "plain"},
    }
    return {told: {"run_dir": root / "refused", **changes} for told, changes in cases.items()}


def diverging(root: Path, world: int) -> list[dict]:
    """Runs that cannot go on: the loss overflows at step 2, or the gradient alone at step 5."""
    ways = {"0": {}, "bf16": {"precision": "bf16"}, **{str(s): {"zero_stage": s} for s in (1, 2, 3)}}
    found = []
    for name in ways if world == 1 else ("0", "3"):
        loss = {"optimizer": {"lr": 1e30, "warmup_steps": 1}, "save_every": 2, "log_every": 10}
        found.append({"run_dir": root / f"loss-{world}-{name}", **ways[name], **loss})
        gradient = {"breaks_at": 5, "keep_checkpoints": 1, "log_every": 10}
        found.append({"run_dir": root / f"gradient-{world}-{name}", **ways[name], **gradient})
    return found


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


def test_a_line_that_a_checkpoint_parts_is_whole(runs: Path) -> None:
    """It is of the steps before the stop as well: the mean of both steps' lines, as of a run that was never stopped."""
    one = [json.loads(line) for line in (runs / "plain" / "log.jsonl").read_text().splitlines()]
    two = [json.loads(line) for line in (runs / "lines-parted" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in two] == [2, 4, 6]
    for number, row in enumerate(two):
        parts = one[2 * number : 2 * number + 2]
        assert row["loss"] == pytest.approx((parts[0]["loss"] + parts[1]["loss"]) / 2, rel=1e-12)
        assert row["grad_norm"] == parts[1]["grad_norm"]


def test_first_gradient_norm_is_that_of_the_plain_model(runs: Path, tokens: Path) -> None:
    """Computed without the training engine, and larger than what it is clipped to."""
    sys.path.insert(0, str(HERE))
    from tiny import config

    settings = config(tokens, tokens)
    loader = PackLoader(settings.data)
    model, batch = build_model(settings, loader), next(loader)
    out = model(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens)
    (out.loss_sum / batch.loss_weight.double().sum()).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert norms(runs / "plain")[0] == pytest.approx(squares**0.5, rel=1e-5)
    assert squares > settings.optimizer.clip**2


@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3", "bf16"])
def test_gradient_norms_are_equal_whatever_is_partitioned(runs: Path, way: str) -> None:
    ours, theirs = norms(runs / way), norms(runs / "plain")
    assert len(ours) == 6
    rtol = 0.03 if way == "bf16" else 1e-4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_norms_are_equal_on_two_processes(runs: Path, stage: int) -> None:
    ours, theirs = norms(runs / f"two-processes-{stage}"), norms(runs / "two-packs")[:3]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_not_finite_is_not_saved(runs: Path, world: int) -> None:
    """Every rank ends the run (else this would wait for ever), all of before is kept, and the message is true."""
    errors = json.loads((runs / f"{world}.json").read_text())
    for run, error in zip(diverging(runs, world), errors, strict=False):
        folder, how = run["run_dir"] / "checkpoints", run["run_dir"].name.partition("-")[0]
        found = sorted(p.name for p in folder.glob("step-*"))
        step = 2 if how == "loss" else 5
        assert error.startswith(f"TrainingError: training stopped at step {step}: the loss is"), (run, error)
        assert f"The newest checkpoint with finite values is {folder / found[-1]};" in error
        # What the interval had learnt until then is saved, and what is older stays although keep_checkpoints is 1.
        assert found == (["step-00000001"] if how == "loss" else ["step-00000003", "step-00000004"])
        for name in found:
            for file in ("model.safetensors", "optimizer.safetensors"):
                assert all(bool(v.isfinite().all()) for v in load_file(folder / name / file).values())


def test_ruined_weights_do_not_replace_good_ones(runs: Path) -> None:
    """Those of step 4 are finite, 1e30 times too large, and saved with one checkpoint to keep; the error names the one
    before it, from which the run ends as if nothing had been."""
    error, after = json.loads((runs / "1.json").read_text())[-2:]
    folder = runs / "ruined" / "checkpoints"
    assert error.startswith("TrainingError: training stopped at step 5: ")
    assert f"finite values is {folder / 'step-00000004'}; the same command goes on from there" in error
    assert f"go on from the one before it with --resume {folder / 'step-00000003'}. " in error
    assert after is None
    ours, theirs = weights(runs / "ruined"), weights(runs / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_keeps_as_many_checkpoints_as_asked(runs: Path) -> None:
    names = {path.name for path in (runs / "two-packs" / "checkpoints").iterdir()}
    assert names == {"step-00000005", "step-00000006", "latest"}


def test_a_rank_that_does_not_see_the_checkpoint_ends_the_run(runs: Path) -> None:
    """Otherwise it would begin anew while the others go on."""
    error = json.loads((runs / "2.json").read_text())[-1]
    folder = runs / "elastic-1" / "checkpoints" / "step-00000003"
    assert error.startswith("CheckpointError: rank 1 (on ")
    assert f"does not see the checkpoint {folder} of step 3 that rank 0 goes on from" in error


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


def test_resume_on_another_number_of_processes(runs: Path) -> None:
    """Three steps on two processes with ZeRO, then three on one without: as six on one."""
    for run in (runs / f"elastic-{stage}" for stage in (1, 3)):
        ours, theirs = losses(run), losses(runs / "two-packs")
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


def test_kill_in_the_middle_and_resume(runs: Path) -> None:
    """SIGKILL after step 4 was logged: the run goes on from step 3 and ends as if nothing had happened."""
    assert len(losses(runs / "killed-then")) in (4, 5)
    assert last(runs / "killed-then").name == "step-00000003"
    assert losses(runs / "killed") == losses(runs / "plain")
    left = sorted(p.name for p in (runs / "killed" / "checkpoints").iterdir())
    assert left == ["latest", "step-00000003", "step-00000006"]


def test_refuses_what_it_cannot_resume(runs: Path) -> None:
    errors = json.loads((runs / "1.json").read_text())[len(diverging(runs, 1)) : -2]
    for expected, error in zip(refused(runs), errors, strict=True):
        assert error is not None and expected in error, (expected, error)
        assert error.startswith("CheckpointError: ")
    assert not list((runs / "refused").glob("checkpoints/*"))
