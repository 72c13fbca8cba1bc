"""Words of every script: marks count, invisible characters do not, and writing the same differently costs nothing."""

from __future__ import annotations

import unicodedata

import pytest

from speechlm_ext.evaluation.text.word_errors import cer, tokens, wer
from speechlm_ext.evaluation.text.words import characters


@pytest.mark.parametrize(
    ("lang", "reference", "hypothesis", "words", "wrong_words", "wrong_characters"),
    [
        ("hi", "किताब मेरी", "कीताब मेरी", 2, 1, 1),  # short i -> long i
        ("ta", "மீன் சாப்பிடு", "மான் சாப்பிடு", 2, 1, 1),
        ("ml", "മലയാളം", "മലയാളം", 1, 0, 0),
        ("kn", "ಕನ್ನಡ ಭಾಷೆ", "ಕನ್ನಡ ಭಾಷ", 2, 1, 1),
        ("my", "မြန်မာ", "မြန်မ", 1, 1, 1),
        ("km", "ភាសា", "ភាសី", 1, 1, 1),
        ("he", "סֵפֶר", "סָפֶר", 1, 1, 1),
        ("ar", "كَتَبَ", "كُتِبَ", 1, 1, 2),  # he wrote -> it was written
        ("yo", "ọkọ́ ọkọ̀", "ọkọ̀ ọkọ̀", 2, 1, 1),  # hoe -> vehicle
        ("vi", "má mà", "ma mà", 2, 1, 1),
        ("th", "ไม้ใหม่", "ไม่ใหม่", 1, 1, 1),
        ("ja", "かき", "がき", 1, 1, 1),
        ("ko", "한국", "한굴", 1, 1, 1),
    ],
)
def test_a_wrong_mark_is_an_error_of_its_word(
    lang, reference, hypothesis, words, wrong_words, wrong_characters
):
    for form in ("NFC", "NFD"):
        pair = [unicodedata.normalize(form, reference)], [hypothesis]
        counts, letters = wer(*pair, lang), cer(*pair, lang)
        assert (counts.total, counts.errors, letters.errors) == (words, wrong_words, wrong_characters)


@pytest.mark.parametrize(
    ("lang", "one", "other"),
    [
        ("fa", "می\u200cخواهم", "میخواهم"),  # zero-width non-joiner
        ("si", "ශ්\u200dරී", "ශ්රී"),  # zero-width joiner
        ("ar", "كـــتاب", "كتاب"),  # stretched
        ("de", "Ver\u00adtrag", "Vertrag"),
        ("en", "\ufeffleft\u200e right", "left right"),
        ("en", "don’t", "don't"),
        ("en", "don´t", "don`t"),
        ("uk", "п’ять", "пʼять"),
        ("he", 'צה"ל', "צה״ל"),
        ("hy", "Ինչպե՞ս", "ինչպես"),
        ("tr", "IŞIK İYİ", "ışık iyi"),
        ("az", "I\u0307LK", "ilk"),
        ("en", "İstanbul", "istanbul"),
        ("el", "ΟΔΟΣ", "οδος"),
        ("ru", "Е\u0308ж", "еж"),
        ("ja", "ｶﾞｷﾞ か゛", "ガギ が"),
        ("zh", "１２３", "123"),
        ("hi", "ए.के. १२", "एके 12"),
        ("ar", "٣٤٥", "345"),
        ("bn", "৩ দিন", "3 দিন"),
        ("uz", "o‘zbek", "oʻzbek"),
    ],
)
def test_the_same_word_written_differently(lang, one, other):
    assert tokens(one, lang) == tokens(other, lang)


@pytest.mark.parametrize(
    ("lang", "text", "expected"),
    [
        ("uz", "Oʻzbekcha oʻt ot", ["oʻzbekcha", "oʻt", "ot"]),  # two vowels, told apart by the sign only
        ("br", "c’hoar", ["cʻhoar"]),
        ("en", "rock 'n' roll", ["rock", "n", "roll"]),
        ("ca", "col·lecció", ["col·lecció"]),
        ("es", "1º y 2.ª", ["1º", "y", "2.ª"]),
        ("es", "M.ª Nº", ["m", "a", "no"]),
        ("en", "10⁵ m²", ["10", "5", "m", "2"]),  # not 105
        ("en", "3½", ["3", "1⁄2"]),  # not 31/2
        ("fr", "12\u202f345", ["12,345"]),
        ("zh", "二〇二四年，你好。", ["二〇二四年", "你好"]),
        ("am", "በ፲፱፻፹፬ ዓ.ም.", ["በ፲፱፻፹፬", "ዓም"]),
        ("bo", "བོད་སྐད", ["བོད", "སྐད"]),
        ("km", "ក\u200bខ", ["ក", "ខ"]),
        ("ckb", "كوردی، زمان؟", ["كوردی", "زمان"]),
        ("en", "5a.m. U.S.A", ["5", "am", "usa"]),
        ("en", "snake_case 👩‍🔬 x", ["snake", "case", "x"]),
        ("xx", "Any tag", ["any", "tag"]),
    ],
)
def test_words_are_split_once(lang, text, expected):
    assert tokens(text, lang) == expected


def test_characters_leave_out_spaces_that_the_script_does_not_write():
    assert characters(["你好", "世界", "ok", "ไป", "มา"]) == "你好世界 ok ไปมา"
    assert cer(["你好世界"], ["你好 世界"], "zh").errors == 0
    assert cer(["à bas"], ["a\u0300bas"], "fr").errors == 1
    assert cer(["안녕 하세요"], ["안녕하세요"], "ko").errors == 1


def test_every_character_can_be_split_and_is_equal_to_itself_decomposed():
    kept = ("L", "M", "N")
    for start in range(0x20, 0x30000, 64):
        chars = [chr(c) for c in range(start, start + 64) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
        text = " ".join(f"a{char}b" for char in chars)
        found = tokens(text)
        assert found == tokens(unicodedata.normalize("NFD", text))
        assert found == tokens(" ".join(found))
        assert all(unicodedata.category(c)[0] in kept for word in found if word.isalpha() for c in word)
