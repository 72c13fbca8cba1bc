"""The command line: help that teaches, unknown keys fail, errors are one line and exit code 2."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from speechlm_ext.cli import VERBS, build_parser, main
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.tokenize.settings import TokenizeConfig
from speechlm_ext.evaluation.evaluate import EvaluateConfig
from speechlm_ext.layout import TokenLayout
from speechlm_ext.utils.options import as_list


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in VERBS)
    assert main([]) == 2 and main(["nonsense"]) == 2


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_setting_is_explained(name: str) -> None:
    """No option stands in --help without a text."""
    for action in build_parser(name)._actions:
        text = action.help or ""
        if action.dest in ("help", "config", "print_config") or text == "==SUPPRESS==":
            continue
        assert len(text.split("(")[0].strip()) >= 3, (name, action.dest, text)


def test_a_group_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kmeans", "--help"]) == 0
    printed = capsys.readouterr().out
    assert (
        all(f"kmeans {verb}" in printed for verb in ("fit", "assign", "inspect"))
        and "evaluate" not in printed
    )
    assert main(["kmeans"]) == 2 and "needs a verb" in capsys.readouterr().err
    assert main(["kmeans", "fitt"]) == 2
    message = capsys.readouterr().err
    assert "unknown verb 'kmeans fitt'" in message and "kmeans fit " in message and "evaluate" not in message


def test_unknown_keys_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--run-dir", "x", "--optimizer.lrr", "3"])
    assert stopped.value.code == 2 and "lrr" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    for text, key in [
        ("run_dir: x\noptimizer: {lrr: 3}\n", "lrr"),
        ("run_dir: x\nmodel: {frame_transformer: {hidden: 3}}\n", "'hidden'"),
    ]:
        recipe.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", str(recipe)])
        assert stopped.value.code == 2 and key in capsys.readouterr().err


def test_layout_verb_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TokenLayout.build(ssl=4, codec=[4], text=9).save(tmp_path / "a")
    TokenLayout.build(ssl=5, codec=[4], text=8).save(tmp_path / "b")
    assert main(["layout", "--path", str(tmp_path / "a"), "--other", str(tmp_path / "a")]) == 0
    assert main(["layout", "--path", str(tmp_path / "a"), "--other", str(tmp_path / "b")]) == 1
    assert "ssl [256, 260) against ssl [256, 261)" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "--path", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("speechlm: error: no token_layout.json") and "\n" not in message
    recipe = Path(__file__).parents[2] / "recipes" / "demo_multiscale.yaml"
    assert main(["train", "--config", str(recipe), "--model.frame_transformer.hidden_size", "30"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("speechlm: error: frame_transformer.hidden_size 30") and "\n" not in message


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_verb_alone_says_what_it_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that people type: a report for doctor, else which settings are missing."""
    try:
        code = main(name.split())
    except SystemExit as stopped:
        code = int(str(stopped.code))
    printed = capsys.readouterr()
    if name == "doctor":
        assert code == 0 and "torch" in printed.out
    else:
        assert code == 2 and "error" in printed.err.lower() and "Traceback" not in printed.err


def test_an_interrupted_verb_ends_with_130(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As shells report SIGINT; 1 means that some requests failed."""

    def interrupted(cfg: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("speechlm_ext.layout.diff.run_layout", interrupted)
    assert main(["layout", "--path", "x"]) == 130
    assert "rerun the same command" in capsys.readouterr().err


# ---- words that all verbs share -------------------------------------------------------------------------------------
def test_every_verb_calls_its_folder_output_dir_and_takes_the_old_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--output_dir", "--output-dir", "--out", "--output", "-o")
    for name, more, given in [
        ("tokenize", ["--manifest", "m"], words),
        ("evaluate", ["--results", "r"], words),
        ("kmeans fit", ["--audio", "a"], words),
        ("kmeans assign", ["--kmeans", "k"], words),
        ("generate", ["--model", "m", "--requests", "r"], words[:3]),
    ]:
        for word in given:
            assert str(settings(name, *more, word, "folder").output_dir) == "folder", (name, word)
    for word in words:
        assert settings("train", word, "folder", "--data.tokens", "t").run_dir == "folder"
    assert settings("generate", "--model", "m", "--task", "tts", "-o", "x.wav").output == Path("x.wav")
    for name, old in [
        ("tokenize", "out"),
        ("evaluate", "out"),
        ("kmeans fit", "output"),
        ("kmeans assign", "output"),
    ]:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert f"--{old} {old.upper()} Old name of ``output_dir``" in printed, name


def test_an_old_word_beside_the_new_one_is_refused_unless_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings("tokenize", "--manifest", "m", "--out", "a", "--output_dir", "a").output_dir == "a"
    assert main(["tokenize", "--manifest", "m", "--out", "a", "--output_dir", "b"]) == 2
    assert "output_dir is 'b' but out, its old name, 'a'" in capsys.readouterr().err
    assert main(["tokenize", "--manifest", "m"]) == 2
    assert "output_dir is needed" in capsys.readouterr().err


def test_old_words_are_taken_in_files_and_in_python(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("manifest: m.jsonl\nout: tokens\n")
    assert settings("tokenize", "--config", tmp_path / "t.yaml").output_dir == "tokens"
    changed = dataclasses.replace(TokenizeConfig("m.jsonl", out="old"), seed=3)
    assert (changed.output_dir, changed.out, changed.seed) == ("old", None, 3)
    assert EvaluateConfig(results=Path("r"), out=Path("e")).output_dir == Path("e")


def test_lists_take_one_plain_value(tmp_path: Path) -> None:
    for value, right in [("a b.jsonl", ["a b.jsonl"]), ("[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"])]:
        tokenize = settings("tokenize", "--manifest", value, "--output_dir", "o", "--delays", "0")
        assert as_list(tokenize.manifest) == right and as_list(tokenize.delays) == [0]
        evaluate = settings(
            "evaluate", "--results", value, f"--manifest={value}", "--tokens", value, "--tasks", value,
            *("--model", "m", "--output_dir", "o"),
        )  # fmt: skip
        assert [as_list(evaluate.results), as_list(evaluate.manifest)] == [[Path(r) for r in right]] * 2
        assert [as_list(evaluate.tokens), as_list(evaluate.tasks)] == [right] * 2
        train = settings("train", "--run_dir", "r", "--data.tokens", value)
        assert as_list(train.data.tokens) == right
        fit = settings("kmeans fit", "--features", value, "--output_dir", "o")
        assert as_list(fit.features) == right
    for words in (
        ["--data.tasks", "textlm", "--data.delays", "2"],
        ["--data.tasks=textlm", "--data.delays=[2]"],
    ):
        train = settings("train", "--run_dir", "r", *words)
        assert (train.data.tasks, train.data.delays) == ([TaskUse("textlm")], [2])
    train = settings("train", "--run_dir", "r", "--data.tasks", '{"task": "textlm", "factor": 2}')
    assert train.data.tasks == [TaskUse("textlm", 2.0)]
    train = settings("train", "--run_dir", "r", "--data.tasks", '[{"task": "a"}, {"task": "b"}]')
    assert train.data.tasks == [TaskUse("a"), TaskUse("b")]
    one = '{"task": "textlm", "langs": "en", "datasets": "books"}'
    train = settings("train", "--run_dir", "r", "--data.tasks", one)
    assert train.data.tasks == [TaskUse("textlm", datasets=["books"], langs=["en"])]
    assert TaskUse("textlm", datasets="books", langs="en") == train.data.tasks[0]
    (tmp_path / "e.yaml").write_text("results: r.jsonl\noutput_dir: o\n")
    assert as_list(settings("evaluate", "--config", tmp_path / "e.yaml").results) == [Path("r.jsonl")]


def settings(name: str, *words: object):
    """What a verb's function would get."""
    seen = []
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, verb.function, lambda cfg: seen.append(cfg))
        assert main([*name.split(), *map(str, words)]) == 0
    return seen[0]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"run_dir: [", "recipe.yaml, line 2, column 1: did not find expected node content"),
        (b"run_dir: x\nsteps: 3\n\tlog_every: 1", "line 3, column 1: found a tab character"),
        (b"steps: 3\nrun_dir: \xff", "line 2: not UTF-8 text"),
        (b"", "holds nothing; expected settings"),
        (b"- a", "holds a list; expected settings"),
        (b"5", "holds 5; expected settings"),
        (b"1: 2", "the name 1 is not text"),
        (b"run_dir: x\x00y", "characters are not allowed"),
        (b"run_dir: *missing", "line 1, column 10: found undefined alias"),
        (b"steps: !!timestamp 2020-99-99", "month must be in 1..12"),
        (b"run_dir: !!python/object:os.system x", "could not determine a constructor"),
        (b"run_dir: " + b"[" * 3000, "nesting depth"),
        (b"steps: many", "Expected a <class 'int'>. Got value: many"),
        (b"data: {tasks: [{task: 5}]}", "Expected a <class 'str'>. Got value: 5"),
        (b"run_dir: x\noptimizer: {lr: .nan}", "--optimizer.lr is NaN"),
        (None, "does not exist"),
        ("folder", "is a folder"),
        ("loop", "does not exist"),
    ],
)  # fmt: skip
def test_a_damaged_settings_file_is_refused_on_one_line(
    data: bytes | str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    if data == "folder":
        path.mkdir()
    elif data == "loop":
        path.symlink_to(path.name)
    elif isinstance(data, bytes):
        path.write_bytes(data)
    for words in (["--config", str(path)], [f"--config={path}"]):
        try:
            code = main(["train", *words])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        printed = capsys.readouterr().err
        assert code == 2 and printed.count("\n") == 1 and printed.startswith("speechlm: error: "), printed
        assert message in printed
