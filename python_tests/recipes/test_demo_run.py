"""The demo's stages: which are skipped, which are repeated, and that no old output is taken for a new one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from python_tests.assets import demo_module, recordings
from speechlm_ext.errors import ConfigError

run = demo_module("run")


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stages that only note that they ran (``train`` leaves a file), and their options."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1\n")
    ran: list[str] = []

    def note(name: str):
        def stage(options):
            ran.append(name)
            if name == "train":
                (options.out / "model").mkdir(exist_ok=True)
                (options.out / "model" / f"run{len(ran)}").touch()

        return stage

    monkeypatch.setattr(run, "STAGES", {n: s._replace(run=note(n)) for n, s in run.STAGES.items()})
    monkeypatch.setattr(run.demo_report, "write", lambda *a, **k: {})
    return ran, run.Options(tmp_path / "out", None, False, None, recipe, None)


ALL = list(run.STAGES)


def test_finished_stages_are_skipped(stages):
    ran, options = stages
    run.run_stages(options, ALL, [])
    assert ran == ALL
    ran.clear()
    run.run_stages(options, ALL, [])
    assert ran == ["report"]
    state = json.loads((options.out / run.STATE).read_text("utf-8"))
    assert list(state) == ALL and all(s["done"] and s["seconds"] >= 0 and s["commit"] for s in state.values())


def test_another_recipe_repeats_training_and_all_after_it(stages):
    ran, options = stages
    run.run_stages(options, ALL, [])
    options.recipe.write_text("steps: 2\n")
    ran.clear()
    run.run_stages(options, ALL, [])
    assert ran == ["train", "generate", "evaluate", "report"]
    assert [p.name for p in (options.out / "model").iterdir()] == ["run1"], "the old model is gone"


def test_a_stopped_stage_runs_again_on_what_it_left(stages, monkeypatch: pytest.MonkeyPatch):
    ran, options = stages
    train = run.STAGES["train"]

    def stopped(o):
        train.run(o)
        raise ConfigError("stopped")

    monkeypatch.setitem(run.STAGES, "train", train._replace(run=stopped))
    with pytest.raises(ConfigError):
        run.run_stages(options, ALL, [])
    monkeypatch.setitem(run.STAGES, "train", train)
    ran.clear()
    run.run_stages(options, ALL, [])
    assert ran == ["train", "generate", "evaluate", "report"]
    # The checkpoints of the stopped run are still there to go on from.
    assert len(list((options.out / "model").iterdir())) == 2


def test_one_stage_can_be_forced(stages):
    ran, options = stages
    run.run_stages(options, ALL, [])
    ran.clear()
    run.run_stages(options, ["evaluate"], ["evaluate"])
    assert ran == ["evaluate"]


def test_requests_ask_for_every_task_and_name_their_utterance(tmp_path: Path):
    make_requests = demo_module("make_requests")
    rows = []
    for number, r in enumerate(recordings()):
        dataset = "numbers" if number % 2 else "prompts"
        text = f"{r.text} one two three four"
        rows.append({"id": r.id, "audio": str(r.path), "text": text, "lang": "en", "dataset": dataset})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    path = tmp_path / "out" / "requests.jsonl"
    make_requests.make_requests(tmp_path / "test.jsonl", path, 50.0, own=False)
    requests = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert {r["task"] for r in requests} == {"asr", "tts", "textlm", "audiolm"}
    assert len({r["id"] for r in requests}) == len(requests)
    ids = {r["id"] for r in rows}
    for request in requests:
        assert request["id"].partition(".")[2] in ids
        if "audio" in request:
            assert (path.parent / request["audio"]).is_file()
    # The headline's set comes first and whole.
    spoken = [r for r in requests if r["task"] == "tts"]
    assert [r["max_len"] for r in spoken] == [400] * 6 + [750] * 4


def test_errors_end_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run.main(["--output_dir", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "manifest.jsonl" in capsys.readouterr().err


def test_an_interrupted_command_is_no_finished_stage(monkeypatch: pytest.MonkeyPatch):
    """``generate`` ends with 1 when some requests failed, which the demo accepts, and with 130 when interrupted."""
    codes = iter([1, 130])
    monkeypatch.setattr(run.subprocess, "run", lambda command: SimpleNamespace(returncode=next(codes)))
    run.speechlm("generate", accept=(0, 1))
    with pytest.raises(ConfigError, match="ended with code 130"):
        run.speechlm("generate", accept=(0, 1))
