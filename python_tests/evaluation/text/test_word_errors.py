"""Text normalisation, the digit-reading rule, and error counts against values worked out by hand."""

from __future__ import annotations

import random

import jiwer
import pytest

from speechlm_ext.errors import ConfigError
from speechlm_ext.evaluation.text.word_errors import (
    align,
    best_reading,
    cer,
    normalize,
    reading_graph,
    tokens,
    wer,
)


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("Forty-seven, PLEASE!", "en", ["forty", "seven", "please"]),
        ("Don't  wait…", "en", ["dont", "wait"]),
        ("At 5 A.M.", "en", ["at", "5", "am"]),
        ("\ufb01ve", "en", ["five"]),
        ("Ещё раз", "ru", ["еще", "раз"]),
        ("1,000.5-2 x", "en", ["1,000.5-2", "x"]),
        ("", "en", []),
    ],
)
def test_tokens(text, lang, expected):
    assert tokens(text, lang) == expected


def test_reference_digits_become_one_number():
    assert normalize("press 47 or 1,000") == "press forty seven or one thousand".split()
    assert normalize("3-4") == ["three", "four"]
    assert normalize("21", "fr") == ["vingt", "et", "un"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "lang", "errors"),
    [
        ("forty seven", "47", "en", 0),
        ("four seven", "47", "en", 0),
        ("four seven", "4 7", "en", 0),
        ("two fifty", "250.", "en", 0),
        ("two hundred fifty", "250", "en", 0),
        ("two hundred and fifty", "250", "en", 0),
        ("eight eleven fifty", "8.11.50", "en", 0),
        ("six seventeen twenty two eighty", "617-202-80", "en", 0),
        ("one thousand", "1,000", "en", 0),
        ("six oh one", "6 O 1", "en", 0),
        ("six zero one", "six oh one", "en", 0),
        ("veinte uno", "21", "es", 0),
        ("veintiuno", "21", "es", 0),
        ("vingt et un", "21", "fr", 0),
        ("sixteen", "60", "en", 1),
        ("sixty", "16", "en", 1),
        ("six ten", "60", "en", 1),
        ("seventy nineteen", "1970", "en", 2),
        ("zero zero seven", "007", "en", 0),
        ("nine", "", "en", 1),
    ],
)
def test_digits_are_read_as_fits_best_and_never_as_others(reference, hypothesis, lang, errors):
    assert wer([reference], [hypothesis], lang).errors == errors


def _paths(graph, node=0):
    if node == len(graph) - 1:
        yield []
    for target, words in graph[node]:
        for rest in _paths(graph, target):
            yield [*words, *rest]


def test_best_reading_is_the_best_of_all_readings():
    rng = random.Random(3)
    words = "zero two seven ten seventeen twenty forty hundred and".split()
    for _ in range(60):
        reference = [rng.choice(words) for _ in range(rng.randint(1, 5))]
        text = " ".join(
            rng.choice(["2", "17", "47", "270", "20-7", "seven", "oh", "1,017"])
            for _ in range(rng.randint(1, 3))
        )
        found = best_reading(reference, text)
        every = list(_paths(reading_graph(text)))
        fewest = min(jiwer.wer(" ".join(reference), " ".join(path)) for path in every)
        assert found in every
        assert jiwer.wer(" ".join(reference), " ".join(found)) == pytest.approx(fewest)


def test_error_counts_by_hand():
    # "one two three" -> "one too three four": one substitution, one insertion; "five six" -> "six": one deletion.
    counts = wer(["one two three", "five six"], ["One too three, four.", "six"])
    assert (counts.substitutions, counts.insertions, counts.deletions) == (1, 1, 1)
    assert (counts.total, counts.utterances, counts.rate) == (5, 2, pytest.approx(3 / 5))
    # "two" -> "too": one of 13 + 8 characters wrong; " four" inserted (5), "five " deleted (5).
    assert cer(["one two three", "five six"], ["One too three, four.", "six"]).errors == 11
    assert counts.to_dict()["rule"]


def test_alignment_for_display():
    assert align("one two three", "one too three four") == [
        ("equal", "one", "one"),
        ("substitute", "two", "too"),
        ("equal", "three", "three"),
        ("insert", "", "four"),
    ]
    assert align("", "what") == [("insert", "", "what")]


@pytest.mark.parametrize(
    ("refs", "hyps", "word"),
    [([], [], "at least one"), (["a"], [], "as many"), (["..."], ["x"], "no words left")],
)
def test_rejects_sets_that_cannot_be_scored(refs, hyps, word):
    with pytest.raises(ConfigError, match=word):
        wer(refs, hyps)


def test_a_language_that_is_none_is_said_once(caplog):
    """Its numbers cannot be read as words, so errors are counted that nobody made."""
    for lang, said in (("english", 1), ("english", 0), ("eng", 0), ("en-US", 0)):
        caplog.clear()
        counted = wer(["20 cats"], ["twenty cats"], lang)
        assert counted.errors == (1 if lang == "english" else 0)
        assert sum("'english' is not the tag of a language" in r.message for r in caplog.records) == said
