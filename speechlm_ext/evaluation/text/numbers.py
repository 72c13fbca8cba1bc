"""Numbers in words, by num2words, in bounded time.

num2words is right for most languages, but for some numbers in some languages it raises undocumented exceptions or never
returns. So each call may execute a limited number of lines of Python, which does not depend on the machine, and a
number without words stays digits. A language is tried once with a number of each length; from the first length that
fails on, its numbers stay digits.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from functools import cache, lru_cache
from typing import Any

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.evaluation.text.words import tokens
from speechlm_ext.utils.language import match_language

log = logging.getLogger(__name__)

#: Maximum digits of a number that is read as a whole.
LONGEST_NUMBER = 12
#: Maximum of lines, calls and returns for one number; no language needs more than 14,000 below 10**12.
MAX_EVENTS = 30_000
_PROBE = "498573261947"
#: Maximum seconds of a call, in case it waits instead of computing.
DEADLINE_S = 0.5

# Converters store the current number in themselves: one call at a time.
_lock = threading.Lock()
_stuck: set[str] = set()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A child process has no thread that could release the lock.
os.register_at_fork(after_in_child=_new_lock)


class _TooLong(BaseException):
    """The bound is reached; not an ``Exception``, so that the library's own handlers do not catch it."""


@lru_cache(maxsize=16384)
def number_words(digits: str, lang: str = "en", form: str = "cardinal") -> tuple[str, ...]:
    """A number in lower-case words, hyphens split; its digits if the language has no words for it.

    ``lang`` may have a region with words of its own (``fr-CH``); ``form`` is ``cardinal`` or ``ordinal``.

    Raises :class:`SpeechLMError`: num2words is not installed.
    """
    try:
        from num2words import CONVERTER_CLASSES
    except ImportError:
        raise SpeechLMError(
            "writing digits as words needs num2words; install it: pip install num2words"
        ) from None
    code = match_language(lang, CONVERTER_CLASSES)
    if code is None or not digits.isdecimal() or len(digits) > _longest(code):
        return (digits,)
    text = _bounded(int(digits), code, form)
    return tuple(tokens(text, lang)) or (digits,)


@cache
def _longest(code: str) -> int:
    """Maximum digits of the numbers that a language has words for."""
    for length in range(1, LONGEST_NUMBER + 1):
        if not _bounded(int(_PROBE[:length]), code, "cardinal"):
            return length - 1
    return LONGEST_NUMBER


def _bounded(number: int, code: str, form: str) -> str:
    """The words from num2words, or ``""`` if it fails or exceeds the bounds."""
    with _lock:
        if code in _stuck:
            return ""
        call = _Call(number, code, form)
        call.start()
        call.join(DEADLINE_S)
        if call.is_alive():
            _stuck.add(code)
            log.warning(
                "num2words does not return for %d in %r; numbers of this language stay digits.", number, code
            )
            return ""
    return call.words


class _Call(threading.Thread):
    """A call of num2words that ends after :data:`MAX_EVENTS`, with an empty result if it fails."""

    def __init__(self, number: int, code: str, form: str) -> None:
        super().__init__(name="number words", daemon=True)
        self._number, self._code, self._form = number, code, form
        self._num_events = 0
        self.words = ""

    def run(self) -> None:
        """Convert the number."""
        import num2words

        # Tracing is per thread, so the caller's debugger or coverage is unaffected.
        sys.settrace(self._trace)
        try:
            words = num2words.num2words(self._number, lang=self._code, to=self._form)
            self.words = words if isinstance(words, str) else ""
        except (Exception, _TooLong):
            pass
        finally:
            sys.settrace(None)

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        self._num_events += 1
        if self._num_events > MAX_EVENTS:
            raise _TooLong
        return self._trace
