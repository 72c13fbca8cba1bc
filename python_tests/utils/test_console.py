"""Output under any encoding, and YAML in which nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from speechlm_ext.cli import main
from speechlm_ext.errors import ConfigError
from speechlm_ext.tasks import parse_templates
from speechlm_ext.utils.console import argument_text
from speechlm_ext.utils.files.yaml_text import parse_yaml

PRINTS = """
import logging, sys
from speechlm_ext.utils.console import make_output_safe
make_output_safe()
print("три – née", flush=True)
print("\\udcff", flush=True)
print("ё", flush=True)
logging.basicConfig(stream=sys.stderr, format="%(message)s")
logging.warning("три \\udcff")
"""


@pytest.mark.parametrize(
    ("env", "out", "num_notes"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "три – née\n\\udcff\nё\n".encode(), 0),
        ({"PYTHONIOENCODING": "ascii"}, b"\\u0442\\u0440\\u0438 \\u2013 n\\xe9e\n\\udcff\n\\u0451\n", 1),
        ({"PYTHONIOENCODING": "cp1252"}, b"\\u0442\\u0440\\u0438 \x96 n\xe9e\n\\udcff\n\\u0451\n", 1),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            b"\\u0442\\u0440\\u0438 \\u2013 n\\xe9e\n\\udcff\n\\u0451\n",
            1,
        ),
    ],
)
def test_what_the_encoding_cannot_hold_is_escaped_and_said_once(env, out, num_notes, tmp_path: Path):
    (tmp_path / "prints.py").write_text(PRINTS, "utf-8")
    clean = {"PYTHONPATH": str(Path(__file__).parents[2])} | {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIO", "PYTHONUTF", "LC_"))
    }
    done = subprocess.run([sys.executable, tmp_path / "prints.py"], capture_output=True, env=clean | env)
    assert (done.returncode, done.stdout) == (0, out), done.stderr
    assert done.stderr.count(b"Set PYTHONIOENCODING=utf-8") == num_notes
    assert b"\\udcff" in done.stderr and b"Traceback" not in done.stderr


def test_the_command_line_makes_its_output_safe_first(monkeypatch: pytest.MonkeyPatch):
    """Help holds signs that ASCII does not have."""
    done = subprocess.run(
        [sys.executable, "-m", "speechlm_ext.cli", "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and b"[--option VALUE \\u2026]" in done.stdout


def test_arguments_in_a_locale_that_is_not_utf8_are_utf8():
    raw = "три".encode().decode("ascii", "surrogateescape")
    assert argument_text(raw) == "три"
    assert argument_text("три") == "три" and argument_text(None) is None
    assert argument_text("\udcff") == "\udcff"  # no UTF-8: refused where it is used


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("a: 1\nb: 2\na: 3\n", "a", 3), ("x:\n  - {k: 1, k: 1}\n", "k", 2), ('{"a": 1, "a": 2}', "a", 1)],
)
def test_a_key_twice_in_yaml_is_refused(text, key, line):
    with pytest.raises(yaml.YAMLError, match=f"key '{key}' occurs twice(.|\n)*line {line}"):
        parse_yaml(text)


def test_yaml_without_such_keys_is_as_ever():
    text = "base: &b {x: 1}\nmore: {<<: *b, y: [*b, *b]}\n1: one\n'1': text\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    with pytest.raises(ConfigError, match="'name' occurs twice"):
        parse_templates(
            "- {name: a, name: b, id: 112, kind: x, conditions: [], targets: []}", "t", range(112, 128)
        )


def test_a_recipe_with_a_key_twice_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("path: a  # три\npath: b\n", "utf-8")
    assert main(["layout", "--config", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "key 'path' occurs twice" in message and "Traceback" not in message


def test_recipes_are_utf8_in_every_locale(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    import locale

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"path: {tmp_path}/три\n", "utf-8")
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *a: "ANSI_X3.4-1968")
    assert main(["layout", "--config", str(recipe)]) == 2
    assert "три" in capsys.readouterr().err
