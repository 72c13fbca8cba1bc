"""Numbers in words for every language of num2words: bounded, and the digits where there are no words."""

from __future__ import annotations

import time

import num2words
import pytest

from speechlm_ext.evaluation.text import numbers
from speechlm_ext.evaluation.text.numbers import number_words
from speechlm_ext.evaluation.text.word_errors import best_reading, normalize, wer


@pytest.fixture
def fresh(monkeypatch):
    """Caches of other tests do not count, and what a patched library says does not stay."""
    number_words.cache_clear(), numbers._longest.cache_clear()
    monkeypatch.setattr(numbers, "_stuck", set())
    yield
    number_words.cache_clear(), numbers._longest.cache_clear()


@pytest.mark.parametrize(
    ("digits", "lang", "words"),
    [
        ("47", "en", "forty seven"),
        ("47", "EN-us", "forty seven"),
        ("70", "fr", "soixante dix"),
        ("70", "fr-CH", "septante"),
        ("25", "nb", "tjuefem"),
        ("12", "kaz", "он екі"),
        ("5", "est", "5"),  # Estonian is not Spanish ("es"), whatever its first two letters
        ("5", "fil", "5"),
        ("1984", "am", "1984"),
        ("999999999", "am", "999999999"),
        ("110", "am", "አንድ መቶ አሥር"),
        ("12", "xx", "12"),
        ("1" * 5000, "en", "1" * 5000),
    ],
)
def test_words_or_the_digits_themselves(digits, lang, words):
    assert " ".join(number_words(digits, lang)) == words


def test_every_language_gives_words_in_bounded_time(fresh):
    values = ["0", "7", "21", "99", "100", "1100", "1984", "20260", "4205835", "568476685", "999999999999"]
    for code in num2words.CONVERTER_CLASSES:
        lang = {"kz": "kk"}.get(code, code)
        begun = time.perf_counter()
        for value in values:
            assert number_words(value, lang), (lang, value)
            assert wer([value], [value], lang).errors == 0, (lang, value)
        assert time.perf_counter() - begun < 10, lang  # generous: the machine may be busy


@pytest.mark.parametrize("error", [TypeError("no"), KeyError(1), RecursionError(), ZeroDivisionError()])
def test_whatever_the_library_raises_costs_no_line(fresh, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(num2words, "num2words", broken)
    assert number_words("12", "en") == ("12",)
    assert wer(["one two"], ["12"], "en").errors == 2


def test_endless_loops_end(fresh, monkeypatch):
    def endless(*args, **kwargs):
        while True:
            pass

    monkeypatch.setattr(num2words, "num2words", endless)
    begun = time.perf_counter()
    assert wer(["x y"], [" ".join(map(str, range(100, 200)))], "de").errors == 100
    assert time.perf_counter() - begun < 5
    assert not numbers._stuck  # by the count of lines, not by the clock


def test_a_call_that_waits_is_left_alone(fresh, monkeypatch):
    calls = []

    def asleep(*args, **kwargs):
        calls.append(args)
        time.sleep(3)

    monkeypatch.setattr(num2words, "num2words", asleep)
    monkeypatch.setattr(numbers, "DEADLINE_S", 0.1)
    assert wer(["x y"], ["12 13 14"], "de").errors == 3
    assert len(calls) == 1


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "1,000,000",
        "12,34,567",
        "1 0 oh o",
        "8.11.50",
        "1º 2ª",
        "9" * 40,
        "000",
        "3½ x²",
        "1٬000 ٣٫٥",
        "۱۲",
    ],
)
def test_a_text_has_no_errors_against_itself(text):
    for lang in ("en", "es", "fr", "ar", "am", "hi"):
        assert best_reading(normalize(text, lang), text, lang) == normalize(text, lang)


def test_ordinal_signs_are_heard():
    assert normalize("1º", "es") == ["primero"] and normalize("2.º", "pt") == ["segundo"]
    assert wer(["primero"], ["1º"], "es").errors == 0
    assert wer(["1º"], ["1ª"], "es").errors == 1
    assert wer(["la 1ª vez"], ["la 1 vez"], "es").total == 3


def test_long_texts_are_quick():
    words = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}" for i in range(3000))
    begun = time.perf_counter()
    assert wer([words], [words + " 47"]).errors == 2
    assert wer(["one two three"], ["4 " * 2000 + "7" * 3000]).errors > 4000
    assert time.perf_counter() - begun < 10
