"""The main job through the command line, tiny: recordings → tokens → model → text and speech → scores."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from python_tests.assets import MANIFEST, SPEECH
from speechlm_ext.cli import main

pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")
pytest.importorskip("jiwer", reason="scoring needs jiwer: pip install 'speechlm_ext[eval]'")


def speechlm(*arguments: object, code: int = 0) -> str:
    """``speechlm …`` in this process, which has imported all that it needs; returns what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = main(list(map(str, arguments)))
        except SystemExit as stopped:
            found = int(str(stopped.code))
    assert found == code, err.getvalue()[-3000:]
    return out.getvalue() if code == 0 else err.getvalue()


def speechlm_process(*arguments: object, code: int = 0) -> str:
    """The same in a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "speechlm_ext.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def tokens(work: Path) -> Path:
    out = work / "tokens"
    speechlm(
        *("tokenize", "--manifest", MANIFEST, "--output_dir", out, "--text.vocab-size", 300),
        *("--ssl.num-clusters", 16, "--codec.num-codebooks", 3, "--codec.codebook-size", 16),
        *("--codec.griffin-lim-iterations", 4),
    )
    return out


@pytest.fixture(scope="module")
def recipe(work: Path, tokens: Path) -> Path:
    path = work / "recipe.yaml"
    path.write_text(
        f"""
run_dir: {work / "run"}
data:
  tokens: ["{tokens}"]
  budget: 512
  tasks: [{{task: codec_ssl_asr}}, {{task: codec_ssl_plain_tts}}, {{task: textlm}}, {{task: codec_ssl_audiolm}}]
model: {{hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64, max_positions: 1024}}
optimizer: {{lr: 0.01, warmup_steps: 5}}
steps: 25
save_every: 25
log_every: 5
""",
        "utf-8",
    )
    return path


@pytest.fixture(scope="module")
def checkpoint(work: Path, recipe: Path) -> Path:
    speechlm_process("train", "--config", recipe)
    return work / "run" / "checkpoints" / "latest"


def test_plan_reports_and_refuses(recipe: Path, work: Path) -> None:
    plan = work / "plan.yaml"
    data = recipe.read_text("utf-8").split("data:")[1].split("model:")[0]
    plan.write_text("data:" + data, "utf-8")
    printed = speechlm("plan", "--config", plan)
    assert "codec_ssl_asr" in printed and "textlm" in printed
    assert "budget" in speechlm("plan", "--config", plan, "--data.budget", 10, code=2)


def test_training_learns(checkpoint: Path, work: Path) -> None:
    lines = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert set(lines[-1]["stream_loss"]) == {"ssl", "codec0", "codec1", "codec2"}
    assert (checkpoint / "tokenizers" / "codec" / "tokenizer.json").is_file()


def test_generate_speech_and_text(checkpoint: Path, work: Path) -> None:
    wav = work / "out.wav"
    speechlm_process(
        "generate", "--model", checkpoint, "--task", "tts", "--text", "three", "--max-len", 20, "-o", wav
    )
    wave, rate = soundfile.read(wav)
    assert rate == 16000 and 0 < len(wave) <= 20 * 320
    printed = speechlm(
        *(
            "generate",
            "--model",
            checkpoint,
            "--task",
            "asr",
            "--audio",
            SPEECH / "digits-3.flac",
            "--max-len",
            5,
        )
    )
    assert isinstance(printed, str)
    assert "not one that the model was trained for" in speechlm(
        *("generate", "--model", checkpoint, "--task", "nonsense", "--text", "a"), code=2
    )


def test_requests_and_scores(checkpoint: Path, work: Path, tokens: Path) -> None:
    rows = [json.loads(line) for line in MANIFEST.read_text("utf-8").splitlines()][:3]
    requests = work / "requests.jsonl"
    requests.write_text(
        "".join(
            json.dumps({"id": r["id"], "task": "asr", "audio": str(SPEECH / r["audio"]), "max_len": 5}) + "\n"
            for r in rows
        ),
        "utf-8",
    )
    generated = work / "generated"
    run = checkpoint.parents[1]  # a run's folder means its newest checkpoint
    speechlm("generate", "--model", run, "--requests", requests, "--output-dir", generated)
    scores = work / "scores"
    speechlm(
        *("evaluate", "--results", generated / "results.jsonl", "--manifest", MANIFEST),
        *("--model", checkpoint.parent, "--tokens", json.dumps([str(tokens)])),
        *("--output_dir", scores, "--judge", "none"),
    )
    records = [json.loads(line) for line in (scores / "records.jsonl").read_text().splitlines()]
    assert [r["reference"] for r in records if r.get("kind", "asr") == "asr"][:3] == [r["text"] for r in rows]
    assert json.loads((scores / "scores.json").read_text())["perplexity"]
    made = [json.loads(line) for line in (generated / "results.jsonl").read_text().splitlines()]
    assert {Path(r["model"]["path"]) for r in made} == {checkpoint.parent / "step-00000025"}


def test_a_stranger_checkpoint_is_refused(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    """Tokens of other tokenizers do not go on with this checkpoint."""
    other = tmp_path / "other"
    speechlm(
        *(
            "tokenize",
            "--manifest",
            MANIFEST,
            "--output_dir",
            other,
            "--text.vocab-size",
            300,
            "--ssl.num-clusters",
            16,
        ),
        *("--codec.num-codebooks", 3, "--codec.codebook-size", 16, "--seed", 1),
        *("--codec.griffin-lim-iterations", 4),
    )
    message = speechlm_process(
        *("train", "--config", recipe, "--run-dir", tmp_path / "run", "--resume", checkpoint.parents[1]),
        *("--data.tokens", other),
        code=2,
    )
    assert "differ" in message
