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


#: Runs a list of command lines one after the other in one process and prints their exit codes.
DRIVER = """
import json, sys
from speechlm_ext.cli import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def train_process(*commands: list[object]) -> tuple[list[int], str]:
    """``speechlm train …`` for each command in one new process, since DeepSpeed keeps global state.

    Returns the exit codes, and the standard error of all.
    """
    words = json.dumps([["train", *map(str, command)] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def tokenize(out: Path, *options: object) -> None:
    speechlm(
        *("tokenize", "--manifest", MANIFEST, "--output_dir", out, "--text.vocab-size", 300),
        *("--ssl.num-clusters", 16, "--codec.num-codebooks", 3, "--codec.codebook-size", 16),
        *("--codec.griffin-lim-iterations", 4, *options),
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def tokens(work: Path) -> Path:
    tokenize(work / "tokens")
    return work / "tokens"


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
def trained(work: Path, recipe: Path) -> tuple[list[int], str]:
    """Exit codes and messages of training, and of resuming it with the tokens of other tokenizers."""
    other = work / "other"
    tokenize(other, "--seed", 1)
    resume = ["--run-dir", work / "run2", "--resume", work / "run", "--data.tokens", other]
    return train_process(["--config", recipe], ["--config", recipe, *resume])


@pytest.fixture(scope="module")
def checkpoint(work: Path, trained: tuple[list[int], str]) -> Path:
    assert trained[0][0] == 0, trained[1][-3000:]
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
    speechlm(
        "generate", "--model", checkpoint, "--task", "tts", "--text", "three", "--max-len", 20, "-o", wav
    )
    wave, rate = soundfile.read(wav)
    assert rate == 16000 and 0 < len(wave) <= 20 * 320
    printed = speechlm(
        *("generate", "--model", checkpoint, "--task", "asr"),
        *("--audio", SPEECH / "digits-3.flac", "--max-len", 5),
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


def test_tokens_of_other_tokenizers_do_not_resume_a_checkpoint(trained: tuple[list[int], str]) -> None:
    codes, messages = trained
    errors = [line for line in messages.splitlines() if line.startswith("speechlm: error: ")]
    assert codes == [0, 2] and len(errors) == 1 and "differ" in errors[0]
