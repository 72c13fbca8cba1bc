"""Checks of configuration files before they are parsed; an error is one line that names file and line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechlm_ext.errors import ConfigError, foreign_errors
from speechlm_ext.utils.files.yaml_text import parse_yaml


def check_config_files(options: Sequence[str]) -> None:
    """Check the files that ``--config`` names among a verb's options; a missing file is left to the parser.

    Raises :class:`ConfigError`: a folder, not UTF-8, not YAML, or not a mapping of settings.
    """
    for word, following in zip(options, [*options, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config":
            path = Path(value if equals else following)
            with foreign_errors(
                ConfigError, f"--config {path} cannot be read", "Give a YAML file of settings."
            ):
                exists = path.exists()
            if exists:
                _check_file(path)


def _check_file(path: Path) -> None:
    hint = "Give a YAML file of settings."
    if path.is_dir():
        raise ConfigError(f"--config {path} is a folder. {hint}")
    with foreign_errors(ConfigError, f"--config {path} cannot be read", hint):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"--config {path}, line {line}: not UTF-8 text. Save the file as UTF-8.") from None
    try:
        with foreign_errors(ConfigError, f"--config {path} is not YAML", "Fix it."):
            value = parse_yaml(text)
    except ConfigError as error:
        problem = error.__cause__
        mark = getattr(problem, "problem_mark", None)
        if mark is None:
            raise
        words = " ".join(str(getattr(problem, "problem", problem)).split())
        raise ConfigError(
            f"--config {path}, line {mark.line + 1}, column {mark.column + 1}: {words}. Fix the YAML there."
        ) from None
    if not isinstance(value, dict):
        what = {type(None): "nothing", list: "a list"}.get(type(value), repr(value)[:80])
        raise ConfigError(f"--config {path} holds {what}; expected settings, one `name: value` a line.")
    odd = next((key for key in value if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"--config {path}: the name {odd!r} is not text; expected settings' names.")


def refuse_nan(settings: Any) -> None:
    """Refuse a setting that is not a number: it would pass every check of bounds. Raises :class:`ConfigError`."""
    for name, value in _leaves(settings, ""):
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"--{name} is NaN; give a number.")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif hasattr(value, "__dict__"):
        items = vars(value).items()
    else:
        yield name, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))
