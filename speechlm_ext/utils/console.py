"""Text of the terminal: standard output that accepts every character, and arguments decoded as text.

Characters outside standard output's encoding (``PYTHONIOENCODING=ascii``, a pipe on Windows, the C locale; a file name
that is not UTF-8) are written as ``\\uXXXX``, and one note explains how to see them. So a result that took hours does
not end in a ``UnicodeEncodeError``.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys

_HANDLER = "speechlm-escape"
_noted = False


def make_output_safe() -> None:
    """Make standard output and standard error accept every text. Every program of the project calls it first."""
    codecs.register_error(_HANDLER, _escape)
    for stream, errors in ((sys.stdout, _HANDLER), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):  # closed or detached
                reconfigure(errors=errors)


def argument_text(word: str | None) -> str | None:
    """A command-line word as text: if the locale could not decode it, its bytes are tried as UTF-8."""
    if word is None or word.isascii() or not any("\ud800" <= char <= "\udfff" for char in word):
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    global _noted
    if isinstance(error, UnicodeEncodeError) and not _noted and not error.encoding.lower().startswith("utf"):
        _noted = True
        with contextlib.suppress(Exception):
            print(
                f"note: standard output is {error.encoding}; characters outside it are written as \\uXXXX. "
                "Set PYTHONIOENCODING=utf-8 to see them.",
                file=sys.stderr,
            )
    return codecs.backslashreplace_errors(error)
