"""Errors that a user can cause, each a ``ValueError`` whose message says how to fix it.

A message has four parts: the expected value, the given one, its place (the item's name), and what to do. The command
line prints it as one line and exits with 2; a traceback means a bug of this package.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class SpeechLMError(ValueError):
    """Base of all errors that bad input causes.

    Args:
        message: the text.
        argument: name of the argument or setting at fault, which the message contains as a word of its own.
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument

    def for_command_line(self) -> str:
        """The message with the argument as an option: ``K-Means: --tol must be ...``."""
        if self.argument is None:
            return str(self)
        return re.sub(rf"(?<!\S){re.escape(self.argument)}(?!\S)", f"--{self.argument}", str(self), count=1)


class ConfigError(SpeechLMError):
    """A setting is impossible or contradicts another."""


class AudioError(SpeechLMError):
    """An audio file or array is missing, unreadable, empty, not finite, or of another rate."""


class ManifestError(SpeechLMError):
    """A manifest line is not valid: bad JSON, not UTF-8, a duplicate id, a missing field or file."""


class TokenizerError(SpeechLMError):
    """A tokenizer cannot be fitted, loaded, or applied to its input."""


class KMeansError(SpeechLMError):
    """K-Means cannot be fitted, loaded, or applied to its input."""


class LayoutError(SpeechLMError):
    """A token layout contradicts itself or lacks a requested part."""


class LayoutMismatchError(LayoutError):
    """Two token layouts that must be equal are not; the message names the first difference."""


class ShardError(SpeechLMError):
    """A token folder is incomplete, truncated, or of another format."""


class PlanError(SpeechLMError):
    """A pack plan is impossible, e.g. a sample longer than the budget."""


class CheckpointError(SpeechLMError):
    """A checkpoint or model folder is missing, incomplete, damaged, belongs to another run, or would hold weights that
    are not finite."""


class TrainingError(SpeechLMError):
    """Training cannot continue: its loss, gradient or weights are not finite, or one of its processes failed."""


class GenerationError(SpeechLMError):
    """A generation request is invalid: unknown task, prompt too long, bad sampling settings."""


class StorageError(SpeechLMError, OSError):
    """A file could not be written: the disk is full or the folder is not writable. ``errno`` is the system's."""


@contextlib.contextmanager
def foreign_errors(error: type[SpeechLMError], where: str, hint: str) -> Iterator[None]:
    """Turn any exception of this block into one ``error``: ``where`` it came from, why, and a ``hint``.

    For blocks that read a user's input: a file, a line, a text. A :class:`SpeechLMError` passes unchanged, and so does
    an exception that is not about the input: no memory, interruption, a failing assertion.
    """
    try:
        yield
    except (SpeechLMError, MemoryError, AssertionError):
        raise
    except BaseException as problem:
        # A panic in a Rust library (tokenizers, safetensors) is not an Exception, but it is about the input.
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        reason = next((line for line in str(problem).strip().split("\n") if line.strip()), "no message")
        kind = "" if type(problem) is ValueError else f" ({type(problem).__name__})"
        raise error(f"{where}: {reason.strip()[:300].rstrip('.')}{kind}. {hint}") from problem


@contextlib.contextmanager
def file_errors(error: type[SpeechLMError], path: object, what: str, hint: str) -> Iterator[None]:
    """Name the file or folder in every error of the block that reads it.

    ``what`` is the problem, e.g. ``"not a SentencePiece tokenizer"``, and ``hint`` the remedy.
    """
    with foreign_errors(error, f"{path}: {what}", hint):
        try:
            yield
        except SpeechLMError as problem:
            if str(path) in str(problem):
                raise
            words = " ".join(str(problem).split()).rstrip(".")
            raise error(f"{path}: {what}: {words[:600]}. {hint}") from None
