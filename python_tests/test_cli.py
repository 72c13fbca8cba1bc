"""The command line: help that teaches, unknown keys fail, errors are one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechlm_ext.cli import VERBS, build_parser, main
from speechlm_ext.layout import TokenLayout


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
    recipe = Path(__file__).parents[1] / "recipes" / "demo_multiscale.yaml"
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


@pytest.mark.parametrize(
    "data, message",
    [
        (b"run_dir: [", "recipe.yaml, line 2, column 1: did not find expected node content"),
        (b"run_dir: x\nsteps: 3\n\tlog_every: 1", "line 3, column 1: found a tab character"),
        (b"steps: 3\nrun_dir: \xff", "line 2: not UTF-8 text"),
        (b"", "holds nothing; expected settings"),
        (b"- a", "holds a list; expected settings"),
        (b"5", "holds 5; expected settings"),
        (b"1: 2", "the name 1 is no text"),
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
