"""Training: the loss falls, runs are exact under resume, and the number of processes does not change the result.

Every test runs for streams side by side with delays, and where it differs for a frame transformer (``multi-scale``).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from python_tests.generation.tools import decode, make_prompt
from python_tests.training.runs import (
    MULTISCALE_WAYS,
    REFUSED,
    REFUSED_MULTISCALE,
    SMALL,
    WAYS,
    errors,
    lines,
    losses,
    newest,
    norms,
    weights,
)
from python_tests.training.tiny import config
from speechlm_ext import SpeechLM
from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.generation import SamplingSettings
from speechlm_ext.generation.requests.encode_fields import content_frames
from speechlm_ext.training import TrainConfig
from speechlm_ext.training.train import build_model, describe_acceleration


def assert_weights(ours: Path, theirs: Path, rtol: float = 0, atol: float = 0) -> None:
    """The newest weights of two runs have the same names, and values within the tolerances."""
    found, wanted = weights(ours), weights(theirs)
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=rtol, atol=atol, msg=f"{ours.name}: {name}"
        )


@pytest.mark.parametrize("layout", ["", "multi-scale"])
def test_loss_falls(runs: Path, layout: str) -> None:
    """One pack holds all the data, so each step sees the same: the loss must fall at every step."""
    values = losses(runs / layout / "falls").tolist()
    assert len(values) == 12 and values[-1] < 0.95 * values[0]
    assert all(b < a for a, b in zip(values[2:], values[3:], strict=False))


def test_a_line_has_values_of_every_stream(runs: Path) -> None:
    line = lines(runs / "multi-scale" / "falls")[-1]
    assert set(line["stream_loss"]) == set(line["stream_accuracy"]) == {"ssl", "codec0", "codec1", "codec2"}
    assert sum(line["stream_share"].values()) == pytest.approx(1)


def test_checkpoint_is_complete(runs: Path) -> None:
    folder = newest(runs / "plain")
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


@pytest.mark.parametrize("run", [*WAYS, *(f"multi-scale/{way}" for way in MULTISCALE_WAYS)])
def test_resume_is_exact(runs: Path, run: str) -> None:
    """Stopped and resumed: the same losses to the last digit, the same weights to the last bit."""
    whole, resumed = runs / run, runs / f"{run}-resumed"
    assert len(losses(whole)) == 6
    assert torch.equal(losses(resumed), losses(whole))
    assert_weights(resumed, whole)
    assert any(name.startswith("frame.") for name in weights(whole)) == run.startswith("multi-scale")


def test_a_line_that_a_checkpoint_parts_is_whole(runs: Path) -> None:
    """It is of the steps before the stop as well: the mean of both steps' lines, as of a run that was never stopped."""
    one, two = lines(runs / "plain"), lines(runs / "lines-resumed")
    assert [row["step"] for row in two] == [2, 4, 6]
    for number, row in enumerate(two):
        parts = one[2 * number : 2 * number + 2]
        assert row["loss"] == pytest.approx((parts[0]["loss"] + parts[1]["loss"]) / 2, rel=1e-12)
        assert row["grad_norm"] == parts[1]["grad_norm"]


def test_first_gradient_norm_is_that_of_the_plain_model(runs: Path, tokens: Path) -> None:
    """Computed without the training engine, and larger than the norm that it is clipped to."""
    settings = config(tokens, tokens)
    loader = PackLoader(settings.data)
    model, batch = build_model(settings, loader), next(loader)
    out = model(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens)
    (out.loss_sum / batch.loss_weight.double().sum()).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert float(norms(runs / "plain")[0]) == pytest.approx(squares**0.5, rel=1e-5)
    assert squares > settings.optimizer.clip**2


@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3", "bf16"])
def test_gradient_norms_are_equal_whatever_is_partitioned(runs: Path, way: str) -> None:
    ours, theirs = norms(runs / way), norms(runs / "plain")
    assert len(ours) == 6
    torch.testing.assert_close(ours, theirs, rtol=0.03 if way == "bf16" else 1e-4, atol=0)


@pytest.mark.parametrize("way", ["recomputed", "zero1", "zero3"])
def test_losses_are_equal_with_recomputation_and_any_stage(runs: Path, way: str) -> None:
    ours, theirs = losses(runs / "multi-scale" / way), losses(runs / "multi-scale" / "plain")
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_accelerations_learn_the_same(runs: Path, way: str) -> None:
    """Thirty steps with the package's own layers and attention, with transformers' layers, and with SDPA as well."""
    ours, theirs = losses(runs / "wide" / "packed"), losses(runs / "wide" / way)
    assert len(ours) == 30 and ours[-1] < 0.9 * ours[0]
    assert not torch.equal(ours, theirs), "both ran the same kernels"
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


def test_first_line_of_the_log_names_what_the_run_uses() -> None:
    settings = TrainConfig(run_dir="x", data=PlanConfig(tokens=["y"]), zero_stage=1)
    line = describe_acceleration(
        settings, torch.device("cpu"), "packed norm, rotary, gate", "float32 on the CPU"
    )
    assert "layers: packed norm, rotary, gate (float32 on the CPU)" in line
    assert "attention: packed (no CUDA device in use (cpu); the package's own kernel)" in line


def test_bf16_keeps_fp32_masters(runs: Path) -> None:
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights(runs / "bf16").values())


# ---- two processes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_learn_the_same(runs: Path, stage: int) -> None:
    """Two processes with one pack each equal one process with two packs a step, for every ZeRO stage."""
    ours, theirs = runs / f"two-processes-{stage}", runs / "two-packs"
    torch.testing.assert_close(losses(ours)[:3], losses(theirs)[:3], rtol=2e-5, atol=0)
    torch.testing.assert_close(norms(ours)[:3], norms(theirs)[:3], rtol=1e-4, atol=0)


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_on_another_number_of_processes(runs: Path, stage: int) -> None:
    """Three steps on two processes with ZeRO, then three on one without: as six on one."""
    ours, theirs = losses(runs / f"two-processes-{stage}"), losses(runs / "two-packs")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "ours, theirs", [("partitioned", "two-packs"), ("partitioned-tied", "two-packs-tied")]
)
def test_partitioned_tables_learn_the_same(runs: Path, ours: str, theirs: str) -> None:
    """ZeRO-3 with every parameter partitioned: losses and weights as of one process, whose table is whole."""
    torch.testing.assert_close(losses(runs / ours), losses(runs / theirs), rtol=2e-5, atol=0)
    assert_weights(runs / ours, runs / theirs, rtol=1e-4, atol=1e-5)
    assert ("head.weight" in weights(runs / ours)) == (ours == "partitioned")


@pytest.mark.parametrize("way", [*(f"two-processes-{stage}" for stage in range(4)), "partitioned"])
def test_two_processes_learn_the_same_frames(runs: Path, tokens: Path, way: str) -> None:
    """Also where one of them has frames to learn and the other has none."""
    loader = PackLoader(config(tokens, tokens, {"data": SMALL["data"]}).data)
    has_frames = [bool((next(loader).loss_weight[:, 1:] > 0).any()) for _ in range(12)]
    assert any(a != b for a, b in zip(has_frames[::2], has_frames[1::2], strict=True))
    ours, theirs = runs / "multi-scale" / way, runs / "multi-scale" / "two-packs"
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=5e-5, atol=0)
    assert_weights(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_rank_that_does_not_see_the_checkpoint_ends_the_run(runs: Path) -> None:
    """Otherwise it would start anew while the others resume."""
    error = errors(runs, 2)["unseen"]
    folder = runs / "two-processes-1" / "checkpoints" / "step-00000003"
    assert error.startswith("CheckpointError: rank 1 (on ")
    assert f"does not see the checkpoint {folder} of step 3 that rank 0 resumes from" in error


# ---- runs that end --------------------------------------------------------------------------------------------------
def test_kill_in_the_middle_and_resume(runs: Path) -> None:
    """SIGKILL after step 4 was logged: the run resumes at step 3 and ends as if nothing had happened."""
    assert len(losses(runs / "killed-then")) == 4
    assert newest(runs / "killed-then").name == "step-00000003"
    assert torch.equal(losses(runs / "killed"), losses(runs / "plain"))
    left = sorted(p.name for p in (runs / "killed" / "checkpoints").iterdir())
    assert left == ["latest", "step-00000003", "step-00000006"]


def test_a_run_keeps_as_many_checkpoints_as_asked(runs: Path) -> None:
    names = {path.name for path in (runs / "two-packs" / "checkpoints").iterdir()}
    assert names == {"step-00000005", "step-00000006", "latest"}


@pytest.mark.parametrize("name, expected", [*REFUSED.items(), *REFUSED_MULTISCALE.items()])
def test_refuses_to_start(runs: Path, name: str, expected: str) -> None:
    error = errors(runs, 1)[name]
    assert expected in error
    if name in REFUSED:
        assert error.startswith("CheckpointError: ")
    assert not list((runs / "refused").glob("checkpoints/*"))


def test_utterances_learnt_by_heart_are_said(runs: Path) -> None:
    """A few random utterances, which only the previous stream can tell apart."""
    run = runs / "multi-scale" / "by-heart"
    values = losses(run)
    assert values[-1] < 0.1 * values[0]
    model = SpeechLM.from_pretrained(run / "checkpoints" / "latest")
    folder, layout = TokenFolder.open(runs / "three-utterances"), model.layout
    prompts, contents = [], []
    for number in range(3):
        stored = folder.utterance(number)
        speech = np.concatenate([stored["ssl"], stored["codec"]], axis=1)
        contents.append(content_frames(speech, "codec_ssl", layout, "test"))
        text = content_frames(stored["text_bpe"], "text_bpe", layout, "test")
        settings = SamplingSettings(greedy=True, max_len=40)
        prompts.append(make_prompt(layout, "codec_ssl_plain_tts", [text], settings=settings))
    for one, content in zip(decode(model, prompts), contents, strict=True):
        np.testing.assert_array_equal(one.content_TS, content)
        assert one.finished == "eos"
