"""Language tags in any spelling: ``en``, ``EN``, ``eng``, ``en-US``, ``en_US`` all mean English.

The rules (BCP 47, ISO 639, macrolanguages, old codes) are those of the ``langcodes`` library. Everything that depends
on a language (number words, case folding, speech recognition) uses this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from speechlm_ext.errors import SpeechLMError

#: Non-standard codes of libraries: Kazakh in num2words.
_WRONG_CODES = {"kz": "kk"}
#: Maximum distance of equal languages in Unicode's CLDR; 0 is the same language, 1 Bokmål and Norwegian.
_SAME = 1
#: Encoding and variant of a POSIX locale: ``de_DE.UTF-8@euro``.
_LOCALE_ENDING = re.compile(r"[.@].*")


def canonical_tag(tag: str) -> str | None:
    """The standard form of a tag: ``EN_us`` gives ``en-US``, ``eng`` gives ``en``.

    Returns:
        None if ``tag`` is not a well-formed tag of a standard language (``english``, ``xx``, ``und``).

    Raises:
        SpeechLMError: langcodes is not installed.
    """
    language = _parse(tag)
    return language.to_tag() if language is not None else None


def base_language(tag: str) -> str:
    """The language of a tag without region and script: ``pt-BR`` gives ``pt``, ``cmn`` its macrolanguage ``zh``; ``""``
    if it is unknown."""
    language = _parse(tag)
    return language.prefer_macrolanguage().language if language is not None else ""


def match_language(tag: str, supported: Iterable[str]) -> str | None:
    """The code among ``supported`` for the language of ``tag``.

    A region in ``supported`` is preferred (``fr-CH`` before ``fr``); otherwise the region is ignored. A language
    matches its macrolanguage (``cmn`` and ``zh``) and languages that CLDR treats as equal (``nb`` and ``no``), never a
    related one (``yue`` is not ``zh``).

    Returns:
        The code as ``supported`` writes it, or None.
    """
    return _match(tag, tuple(supported))


@lru_cache(maxsize=1024)
def _match(tag: str, supported: tuple[str, ...]) -> str | None:
    language = _parse(tag)
    if language is None:
        return None
    codes: dict[str, str] = {}
    for code in supported:
        known = _parse(_WRONG_CODES.get(code, code))
        if known is not None:
            codes.setdefault(known.to_tag(), code)
    for name in (f"{language.language}-{language.territory}", language.language):
        if name in codes:
            return codes[name]
    import langcodes

    best = (
        min((langcodes.tag_distance(language.language, name), name) for name in codes) if codes else (9, "")
    )
    return codes[best[1]] if best[0] <= _SAME else None


@lru_cache(maxsize=1024)
def _parse(tag: str) -> Any:
    try:
        import langcodes
    except ImportError:
        raise SpeechLMError(
            "reading language codes needs langcodes; install it: pip install 'speechlm_ext[eval]'"
        ) from None
    try:
        language = langcodes.get(_LOCALE_ENDING.sub("", tag.strip()))
    except (ValueError, AttributeError):
        return None
    return (
        language
        if language.language not in (None, "und", "mul", "zxx", "mis") and language.is_valid()
        else None
    )
