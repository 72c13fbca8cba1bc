"""How the room puts things: numbers with their nouns, and its messages in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from speechlm_ext.errors import SpeechLMError

Run = TypeVar("Run", bound=Callable[[Any], int])

#: Arguments of ``KMeans`` that the commands have as options, by another name or the same.
_OPTIONS = {
    "n_clusters": "n_clusters", "init_size": "init_size", "n_local_trials": "n_local_trials", "n_init": "n_init",
    "max_iter": "max_iter", "tol": "tol", "batch_size": "batch_size", "random_state": "seed"}  # fmt: skip
#: What messages say in Python, and what on the command line. Whole phrases: file names are left as they are.
_PHRASES = (
    ('leave such rows out with nonfinite="drop"', "leave such rows out with --nonfinite drop"),
    ("say which holds the features with column=", "say which holds the features with --column"),
    (": frames_per_token must be", ": --frames_per_token must be"),
)
_ARGUMENT = re.compile(rf"^K-Means: ({'|'.join(_OPTIONS)})(?:=(\S+))? ")


def counted(count: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_options(message: str) -> str:
    """A message of the room that names an argument, with the option of ``speechlm kmeans`` instead."""
    for python, option in _PHRASES:
        message = message.replace(python, option)

    def option_of(match: re.Match[str]) -> str:
        value = "" if match[2] is None else f"{match[2]} "
        return f"K-Means: --{_OPTIONS[match[1]]} {value}"

    return _ARGUMENT.sub(option_of, message)


def speaks_options(run: Run) -> Run:
    """Make a command's function name options in the errors that come from below."""

    @wraps(run)
    def told(cfg: Any) -> int:
        try:
            return run(cfg)
        except SpeechLMError as error:
            message = in_options(str(error))
            if message == str(error):
                raise
            raise type(error)(message) from None

    return told  # type: ignore[return-value]
