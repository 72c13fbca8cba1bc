"""Training with a frame transformer: exact resume, any ZeRO stage and number of processes, and learning by heart."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from python_tests.generation.tools import make_prompt
from python_tests.training.test_train import HERE, drive, losses, weights
from speechlm_ext import SpeechLM
from speechlm_ext.data.loader import PackLoader
from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.generation import SamplingSettings
from speechlm_ext.generation.engine.engine import decode
from speechlm_ext.generation.requests.encode_fields import content_frames

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")

MULTISCALE = {
    "delays": [0, 0, 0, 0],
    "frame_transformer": {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 12},
}
WAYS: dict[str, dict] = {
    "plain": {},
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "bf16": {"precision": "bf16"},
}
#: Packs of one or two samples, so that some hold no frame that is learnt: recognition alone.
SMALL = {**MULTISCALE, "budget": 44}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(HERE))
    from tiny import make_tokens

    return make_tokens(tmp_path_factory.mktemp("tokens") / "train")


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    plan: list[dict] = [{"run_dir": root / "falls", "budget": 4096, "steps": 12, **MULTISCALE}]
    plan.append({"run_dir": root / "recomputed", **MULTISCALE, "activation_checkpointing": True})
    for name, changes in WAYS.items():
        plan.append({"run_dir": root / name, **MULTISCALE, **changes})
        plan.append({"run_dir": root / f"{name}-parted", **MULTISCALE, **changes, "stop_at": 3})
        plan.append({"run_dir": root / f"{name}-parted", **MULTISCALE, **changes})
    plan.append({"run_dir": root / "two-packs", "accumulation": 2, **SMALL})
    results = drive(tokens, plan)
    assert results == [None] * len(results)
    both = [{"run_dir": root / f"two-processes-{s}", "zero_stage": s, **SMALL} for s in (0, 1, 2, 3)]
    both.append({"run_dir": root / "partitioned", "zero_stage": 3, "partition": True, **SMALL})
    results = drive(tokens, both, world=2)
    assert results == [None] * len(results)
    return root


def small_plan(tokens: Path) -> PlanConfig:
    from tiny import config

    plan = config(tokens, tokens).data
    return replace(plan, budget=SMALL["budget"], delays=SMALL["delays"])


def test_loss_falls_and_is_told_per_stream(runs: Path) -> None:
    values = losses(runs / "falls")
    assert len(values) == 12 and values[-1] < 0.95 * values[0]
    assert all(b < a for a, b in zip(values[2:], values[3:], strict=False))
    line = json.loads((runs / "falls" / "log.jsonl").read_text().splitlines()[-1])
    assert set(line["stream_loss"]) == set(line["stream_accuracy"]) == {"ssl", "codec0", "codec1", "codec2"}
    assert sum(line["stream_share"].values()) == pytest.approx(1)


@pytest.mark.parametrize("way", list(WAYS))
def test_resume_is_exact(runs: Path, way: str) -> None:
    assert len(losses(runs / way)) == 6
    assert losses(runs / f"{way}-parted") == losses(runs / way)
    ours, theirs = weights(runs / f"{way}-parted"), weights(runs / way)
    assert any(name.startswith("frame.") for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("way", ["recomputed", "zero1", "zero3"])
def test_ways_that_change_nothing(runs: Path, way: str) -> None:
    ours, theirs = torch.tensor(losses(runs / way)), torch.tensor(losses(runs / "plain"))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    "way", ["two-processes-0", "two-processes-1", "two-processes-2", "two-processes-3", "partitioned"]
)
def test_two_processes_learn_the_same(runs: Path, tokens: Path, way: str) -> None:
    """Also where one of them has frames to learn and the other has none."""
    loader = PackLoader(small_plan(tokens))
    has_frames = [bool((next(loader).loss_weight[:, 1:] > 0).any()) for _ in range(12)]
    assert any(a != b for a, b in zip(has_frames[::2], has_frames[1::2], strict=True))
    wanted = losses(runs / "two-packs")
    torch.testing.assert_close(torch.tensor(losses(runs / way)), torch.tensor(wanted), rtol=5e-5, atol=0)
    found = weights(runs / way)
    for name, value in weights(runs / "two-packs").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_refuses_delays_and_other_models(runs: Path, tokens: Path, tmp_path: Path) -> None:
    last = str(sorted((runs / "plain" / "checkpoints").glob("step-*"))[-1])
    frame = {"frame_transformer": MULTISCALE["frame_transformer"]}
    cases = {
        "delays them by [0, 1, 2, 3]. Set data.delays to [0, 0, 0, 0]": frame,
        "has 4 streams, so it takes as many delays; got [0, 0]": {**frame, "delays": [0, 0]},
        "does not fit the model": {"delays": [0, 0, 0, 0], "resume": last},
        "another pack plan": {"resume": last},
    }
    errors = drive(tokens, [{"run_dir": tmp_path / "new", **changes} for changes in cases.values()])
    for expected, error in zip(cases, errors, strict=True):
        assert error is not None and expected in error, (expected, error)


def test_what_was_learnt_by_heart_is_said(tmp_path: Path) -> None:
    """A few random utterances, which no stream but the one before can tell apart: each is said code for code."""
    sys.path.insert(0, str(HERE))
    from tiny import make_tokens

    tokens = make_tokens(tmp_path / "tokens", num=3, seed=3)
    changes = {
        "run_dir": tmp_path / "run", "hidden_size": 32, "budget": 4096, "steps": 150, "save_every": 150,
        "delays": [0, 0, 0, 0], "optimizer": {"lr": 1e-2, "warmup_steps": 10, "weight_decay": 0.0},
        "frame_transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
    }  # fmt: skip
    assert drive(tokens, [changes]) == [None]
    values = losses(tmp_path / "run")
    assert values[-1] < 0.1 * values[0]
    model = SpeechLM.from_pretrained(tmp_path / "run" / "checkpoints" / "latest")
    folder, layout = TokenFolder.open(tokens), model.layout
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
