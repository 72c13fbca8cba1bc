"""Number words of the demo's five languages, and the spelling-out of digits in transcripts.

``RECORDED_WORDS[lang]`` maps a recording ``digits/<key>`` of that voice to the word spoken in it. The words are written
out here because the packages' transcripts have errors (the Spanish list calls two recordings ``digits/0``). Composed
strings have no French 17–19, 70, 80 and 90: written without hyphens they are the same words as "dix" + "sept" or
"quatre" + "vingt", so text and audio would not determine each other.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_KEYS = [str(n) for n in range(20)] + [str(n) for n in range(20, 100, 10)]

_WORDS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte treinta cuarenta cincuenta sesenta setenta ochenta "
    "noventa",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
    "dix-sept dix-huit dix-neuf vingt trente quarante cinquante soixante soixante-dix quatre-vingts "
    "quatre-vingt-dix",
    "it": "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici "
    "quindici sedici diciassette diciotto diciannove venti trenta quaranta cinquanta sessanta settanta "
    "ottanta novanta",
    "ru": "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать "
    "четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать двадцать тридцать сорок "
    "пятьдесят шестьдесят семьдесят восемьдесят девяносто",
}

#: language → {number as written with digits: its word}, 0–19 and the tens.
NUMBER_WORDS = {lang: dict(zip(_KEYS, words.split(), strict=True)) for lang, words in _WORDS.items()}

#: language → {name of the recording under ``digits/``: the word spoken in it}, for composed strings.
RECORDED_WORDS = {
    lang: {k: w for k, w in words.items() if "-" not in w} for lang, words in NUMBER_WORDS.items()
}
RECORDED_WORDS["fr"].pop("80", None)

_DIGITS = re.compile(r"\d+")
#: Symbols with a spoken name, and letters lost to a wrong encoding ("sar? esattamente").
_UNREADABLE = re.compile(r"[*#&@%\ufffd]|\?(?=\s*[a-zà-ÿ])")
_LETTERS_ONLY = regex.compile(r"[^\p{L}\p{M}\p{N}' ]")


def normalize(text: str, lang: str) -> str | None:
    """The lower-case words of ``text``, in the form in which the demo writes and scores every transcript.

    Numbers of the table above become words, typographic apostrophes become ``'``, hyphens and all other
    punctuation become spaces, dots inside abbreviations vanish (``A.M.`` → ``am``), and runs of spaces become
    one.

    Returns:
        The normalized text, or None if its reading is unknown: another number, a symbol with a spoken name (``*``,
        ``#``, ``&``), a damaged character.
    """
    if _UNREADABLE.search(text):
        return None
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'").replace("ё", "е")
    text = re.sub(r"(?<=\b\w)\.(?=\w\b)", "", text)
    words = NUMBER_WORDS.get(lang, {})
    for number in _DIGITS.findall(text):
        if number not in words:
            return None
    text = _DIGITS.sub(lambda match: f" {words[match.group()]} ", text)
    text = " ".join(_LETTERS_ONLY.sub(" ", text).split())
    text = " ".join(word.strip("'") for word in text.split())
    return text or None
