"""Reading files of JSON lines: every line with its place, so that a bad one is named and need not stop the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.files.json_text import parse_json, split_lines


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
        """The JSON value, in which NaN and infinities may occur; readers check numbers by key.

        Raises:
            ValueError: not JSON; the message has no place in it.
        """
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
    """Read a file of JSON lines, without parsing them.

    Args:
        path: the file.
        what: its kind, for messages, e.g. ``manifest``.
        error: the class of errors raised.
        all_utf8: refuse the file if any line is not UTF-8; otherwise that is the line's own problem.

    Raises:
        SpeechLMError: of class ``error``: the file cannot be read, or is not UTF-8.
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
