"""Language tags in the forms that people write."""

from __future__ import annotations

import pytest

from speechlm_ext.utils.language import base_language, canonical_tag, match_language

WHISPER = ("en", "zh", "yue", "pt", "jw", "tl", "no", "nn", "he", "sr", "ro", "fa", "de")


@pytest.mark.parametrize(
    ("tag", "canonical", "base", "code"),
    [
        ("en", "en", "en", "en"),
        ("EN", "en", "en", "en"),
        ("eng", "en", "en", "en"),
        ("en_us", "en-US", "en", "en"),
        ("en_US.UTF-8", "en-US", "en", "en"),
        ("zh-Hant-HK", "zh-Hant-HK", "zh", "zh"),
        ("cmn", "cmn", "zh", "zh"),
        ("zh-yue", "yue", "yue", "yue"),
        ("pt-BR", "pt-BR", "pt", "pt"),
        ("ger", "de", "de", "de"),
        ("iw", "he", "he", "he"),
        ("jv", "jv", "jv", "jw"),
        ("fil-PH", "fil-PH", "fil", "tl"),
        ("nb", "nb", "nb", "no"),
        ("nn", "nn", "nn", "nn"),
        ("sh", "sr-Latn", "sr", "sr"),
        ("mo", "ro", "ro", "ro"),
        ("prs", "fa-AF", "fa", "fa"),
        ("gsw", "gsw", "gsw", None),
        ("hr", "hr", "hr", None),
        ("xx", None, "", None),
        ("english", None, "", None),
        ("und", None, "", None),
        ("", None, "", None),
    ],
)
def test_tags(tag, canonical, base, code):
    assert canonical_tag(tag) == canonical
    assert base_language(tag) == base
    assert match_language(tag, WHISPER) == code


def test_a_region_of_its_own_goes_first():
    assert match_language("fr-CH", ("fr", "fr_CH")) == "fr_CH"
    assert match_language("fr-CA", ("fr", "fr_CH")) == "fr"
    assert match_language("kk", ("kz",)) == "kz"
    assert match_language("en", ()) is None
