"""The words of a text in any script, for comparison.

The rules are Unicode's, by the character properties of the ``regex`` library:

* NFKC, so composed and decomposed input are the same; lower case by the language's rule (Turkish ``I`` -> ``ı``); final
  sigma is sigma;
* a word is a run of letters and of the *marks* on them, which are never dropped: a vowel sign, tone or point that
  differs is an error;
* invisible characters (joiners, soft hyphens, direction and variation marks) are dropped and do not split a word, and
  so are apostrophes ("don't" -> "dont") except where the language writes a sound with them;
* decimal digits of every script are the digits 0-9;
* punctuation and symbols separate words and are dropped. In scripts without spaces between words (Thai, Chinese) the
  text between spaces or punctuation is one "word": compare characters there.
"""

from __future__ import annotations

import unicodedata

import regex

from speechlm_ext.utils.language import base_language
from speechlm_ext.utils.text import NO_SPACES

#: In these languages an apostrophe is a letter: Uzbek oʻ, Hawaiian ʻokina, Breton cʼh, Guarani ʼ.
_APOSTROPHE_IS_LETTER = {"br", "gn", "haw", "qu", "sm", "to", "ty", "uz"}
#: Languages whose capital of ``ı`` is ``I`` (SpecialCasing.txt).
_DOTLESS_I = {"az", "tr"}

_LETTER = r"[\p{L}\p{M}\p{Nl}\p{No}]"
#: One number, with separators inside it, and the sign of an ordinal ("1º", "2.ª"); after :func:`fold`.
DIGITS = regex.compile(r"[0-9]+(?:[.,:/'\u066b\u066c\u2044\u2212\p{Pd}][0-9]+)*(?:\.?[ºª])?")
#: A middle dot between Latin letters is part of a letter ("col·lecció"), else a separator.
_TOKEN = regex.compile(
    rf"{DIGITS.pattern}"
    rf"|{_LETTER}+(?:(?:'|(?<=\p{{Latin}}\p{{M}}*)[·‧](?=\p{{Latin}})){_LETTER}+)*"
)
_INITIALS = regex.compile(r"(?<![\p{L}\p{M}])(?:\p{L}\p{M}*\.){2,}")
#: Small and compound digits, which NFKC would melt into their neighbours: 10² is not 102, 3½ not 31/2.
_SMALL_DIGITS = regex.compile(r"[⁰¹²³⁴-⁹]+|[₀-₉]+|\p{No}")
#: A space that groups digits by three; NFKC would make it a plain one.
_GROUPING_SPACE = regex.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
#: Kana's voicing marks as signs of their own; the combining ones belong to the letter before.
_KANA_MARK = regex.compile(r"(?<=[\p{Hiragana}\p{Katakana}])[゛゜]")
#: Accents that are typed as apostrophes.
_ACCENT_APOSTROPHES = str.maketrans("´`", "''")
#: Spacing accents, which NFKC would turn into a space with a mark on it.
_SPACING_ACCENTS = regex.compile(r"[\p{Sk}™℠]")
#: Invisible: default ignorables but the zero-width space, which Unicode defines as a boundary; enclosing marks; the
#: stretching of Arabic and N'Ko letters; Armenian signs of tone inside a word.
_INVISIBLE = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\p{Me}\u0640\u07fa--\u200b]|(?<=\p{Armenian})[\u055b-\u055e](?=\p{Armenian})",
    regex.VERSION1,
)
_APOSTROPHES = regex.compile("[’‘‛ʼʻ＇]")
_HEBREW_INNER = regex.compile(r"(?<=\p{Hebrew})[״׳'\"”“](?=\p{Hebrew})")
_ANY_APOSTROPHE_INSIDE = regex.compile(rf"(?<={_LETTER})['’‘‛＇](?={_LETTER})")
_NO_SPACES = regex.compile(NO_SPACES)


def fold(text: str, lang: str = "en") -> str:
    """The text with one spelling for equivalent characters, by the rules of the module's docstring; word boundaries
    stay."""
    language = base_language(lang)
    text = unicodedata.normalize("NFC", text).translate(_ACCENT_APOSTROPHES)
    text = _KANA_MARK.sub(lambda match: "\u3099" if match.group() == "゛" else "\u309a", text)
    text = _GROUPING_SPACE.sub(",", text)
    text = _SMALL_DIGITS.sub(_apart, _SPACING_ACCENTS.sub(" ", text))
    # Ordinal signs at a number stay: as letters "1º" would be "1 o", which English reads as "one oh".
    parts = regex.split(r"((?<=\d\.?)[ºª])", text)
    text = "".join(part if part in ("º", "ª") else unicodedata.normalize("NFKC", part) for part in parts)
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    text = regex.sub(r"\d", lambda match: str(unicodedata.decimal(match.group())), text)
    if language in _APOSTROPHE_IS_LETTER:
        text = regex.sub("[ʼʻ]", "ʻ", _ANY_APOSTROPHE_INSIDE.sub("ʻ", text))
    else:
        text = _APOSTROPHES.sub("'", text)
    text = _HEBREW_INNER.sub("", text)
    text = _INITIALS.sub(lambda match: match.group().replace(".", ""), text)
    if language in _DOTLESS_I:
        text = text.replace("I", "ı").replace("İ", "i")
    text = text.lower().replace("ς", "σ").replace("i\u0307", "i")
    if language == "ru":
        text = text.replace("ё", "е")
    return unicodedata.normalize("NFC", text)


def _apart(match: regex.Match[str]) -> str:
    digits = match.group()
    return f" {digits} " if unicodedata.decomposition(digits[0]) else digits


def tokens(text: str, lang: str = "en") -> list[str]:
    """Split text into lower-case words and digit strings, by the rules of the module's docstring.

    Digit strings keep the separators inside them ("1,000.5"); ordinal signs stay at their number ("1º"); "A.M." becomes
    "am"; Russian ё becomes е.

    Args:
        text: any string.
        lang: language tag in any usual form; for an unknown one only the common rules apply.
    """
    return [
        token if token[0] in "0123456789" else token.replace("'", "")
        for token in (match.group() for match in _TOKEN.finditer(fold(text, lang)))
    ]


def characters(words: list[str] | tuple[str, ...]) -> str:
    """The text whose characters are counted: words joined by single spaces, or by none between two words of a script
    without spaces.

    Characters are code points after NFC, as usual in the field: a letter with a wrong mark is one error and the letter
    itself is right; in scripts with composed letters (é, 각) a code point is a grapheme cluster.
    """
    parts = list(words[:1])
    for before, word in zip(words, words[1:], strict=False):
        close = _NO_SPACES.match(before[-1]) and _NO_SPACES.match(word[0])
        parts.append(word if close else f" {word}")
    return "".join(parts)
