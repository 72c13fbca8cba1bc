"""Strict reading of JSON text, files and lines, and writing of JSON lines and documents.

Stricter than :mod:`json` where leniency loses data: a key that occurs twice in an object is an error (the last value
would silently win), NaN and infinities are errors (they are not JSON, and few readers accept them), and lines end at a
line feed only: JSON strings may contain Unicode's line and paragraph separators. Each line of a file of JSON lines has
its place, so that a bad one is named and need not stop the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from speechlm_ext.errors import SpeechLMError


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """Parse one JSON text, bytes in UTF-8, strictly.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a key that occurs twice in an object, or a number that is
            not finite (unless ``allow_nan``). Callers add file and line to the message.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}") from None
    constant = None if allow_nan else _refuse_constant
    try:
        number = None if allow_nan else _finite
        return json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None


def read_json(path: str | Path, error: type[SpeechLMError], hint: str, *, allow_nan: bool = False) -> Any:
    """Read a JSON file; ``hint`` is the remedy for a damaged one.

    Raises:
        FileNotFoundError: the file is missing; the caller says what that means.
        SpeechLMError: of class ``error``: the file cannot be read or is not strict JSON; the message names it.
    """
    try:
        return parse_json(Path(path).read_bytes(), allow_nan=allow_nan)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}); {hint}") from None
    except ValueError as problem:
        raise error(f"{path} is damaged: {problem}; {hint}") from None


def json_line(value: Any) -> str:
    """One line of a JSON lines file, its line feed included; the counterpart of :func:`split_lines`.

    Text is written unescaped, unless UTF-8 cannot hold it (a file's name that is not UTF-8): then the line has escapes,
    which read back as the same name.
    """
    return _dump(value, None)


def json_document(value: Any) -> str:
    """An indented JSON document; otherwise as :func:`json_line`."""
    return _dump(value, 2)


def _dump(value: Any, indent: int | None) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text + "\n"


def split_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """``(number, line)`` of each line that is not blank, numbered from 1 and split at line feeds only; a byte order
    mark at the start is dropped."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


@dataclass(frozen=True)
class JsonLine:
    """A line that is not blank."""

    path: Path
    number: int
    """From 1."""
    text: bytes

    @property
    def where(self) -> str:
        """``file:line``, for messages."""
        return f"{self.path}:{self.number}"

    def value(self) -> Any:
        """The JSON value, NaN and infinities included. Raises ``ValueError``: not JSON."""
        return parse_json(self.text, allow_nan=True)

    def object(self) -> dict[str, Any]:
        """The JSON object. Raises ``ValueError`` as :meth:`value`, and for another value than an object."""
        value = self.value()
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
        return value


def json_lines(path: Path, data: bytes) -> Iterator[JsonLine]:
    """The lines of a file's content."""
    return (JsonLine(path, number, text) for number, text in split_lines(data))


def read_json_lines(
    path: Path, what: str, error: type[SpeechLMError], *, all_utf8: bool = True
) -> list[JsonLine]:
    """Read a file of JSON lines, without parsing them; ``what`` is its kind, e.g. ``manifest``.

    Raises ``error``: the file cannot be read, or with ``all_utf8`` a line is not UTF-8; else the line has the problem.
    """
    try:
        data = path.read_bytes()
        if all_utf8:
            data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{what} {path} is not UTF-8 (byte {problem.start}); save it as UTF-8.") from None
    except OSError as problem:
        reason = problem.strerror or problem
        raise error(
            f"{what} {path} cannot be read ({reason}); expected a file with one JSON object per line."
        ) from None
    return list(json_lines(path, data))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} occurs twice in one object; keep one of them")
        result[key] = value
    return result


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is larger than any finite number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
