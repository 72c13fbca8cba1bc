"""Numbers in words, by num2words, in bounded time.

num2words is right for most languages, but for some numbers in some languages it raises what is in no documentation, or
never returns. One number must not cost an evaluation: each call may execute so many lines of Python, which does not
depend on the machine, and a number that has no words is its own digits. A language is tried once with a number of each
length; from the first length that fails on, its numbers are digits.
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

#: Numbers longer than this are read digit group by digit group only.
LONGEST_NUMBER = 12
#: Lines, calls and returns that one number may take; the most that any language needs below 10**12 is 14,000.
MAX_EVENTS = 30_000
_PROBE = "498573261947"
#: What bounds a call that waits instead of computing.
DEADLINE_S = 0.5

# Converters keep the number that they work on in themselves, so one at a time.
_lock = threading.Lock()
_stuck: set[str] = set()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A child process must not wait for a thread that it does not have.
os.register_at_fork(after_in_child=_new_lock)


class _TooLong(BaseException):
    """The bound is reached; no ``Exception``, so that the library's own handlers let it through."""


@lru_cache(maxsize=16384)
def number_words(digits: str, lang: str = "en", form: str = "cardinal") -> tuple[str, ...]:
    """A number in words; the digits themselves where there are no words for it.

    Args:
        digits: decimal digits 0-9.
        lang: language tag in any usual form; its region counts where it has words of its own (``fr-CH``).
        form: ``cardinal`` or ``ordinal``.

    Returns:
        Lower-case words, hyphens split.

    Raises:
        SpeechLMError: num2words is not installed.
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
    """Digits of the longest numbers that a language has words for."""
    for length in range(1, LONGEST_NUMBER + 1):
        if not _bounded(int(_PROBE[:length]), code, "cardinal"):
            return length - 1
    return LONGEST_NUMBER


def _bounded(number: int, code: str, form: str) -> str:
    """What num2words says within the bounds, else ``""``."""
    import num2words

    said: list[Any] = []

    def work() -> None:
        count = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            count += 1
            if count > MAX_EVENTS:
                raise _TooLong
            return trace

        # Tracing is the thread's own, so the caller's debugger or coverage is not touched.
        sys.settrace(trace)
        try:
            said.append(num2words.num2words(number, lang=code, to=form))
        except (Exception, _TooLong):
            pass
        finally:
            sys.settrace(None)

    with _lock:
        if code in _stuck:
            return ""
        worker = threading.Thread(target=work, name="number words", daemon=True)
        worker.start()
        worker.join(DEADLINE_S)
        if worker.is_alive():
            _stuck.add(code)
            log.warning(
                "num2words does not return for %d in %r; numbers of this language stay digits.", number, code
            )
            return ""
    return said[0] if said and isinstance(said[0], str) else ""
