"""Text tokenizers: every string comes back exactly, whatever the training texts were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.assets import recordings
from speechlm_ext.errors import ConfigError, TokenizerError
from speechlm_ext.tokenizers import HuggingFaceText, SentencePieceText, TextConfig, load_tokenizer

STRINGS = [
    "",
    " ",
    "three",
    "please wait while i connect your call",
    "  two  spaces, Capitals and\ttabs\nlines ",
    "сорок два",
    "日本語のテキスト",
    "ﬁﬀ ½ ① e\u0301 é",  # NFKC would change these
    "👩‍👩‍👧 🎉🇺🇳",
    "العربية עברית",
    "\x00\x7f\u200b\ufeff",
]


@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_round_trip_is_exact(string, model_type):
    text = _trained(model_type)
    ids = text.encode(string)
    assert ids.dtype == np.int32 and ids.shape == (len(ids), 1)
    assert text.decode(ids) == string
    assert 0 not in ids  # 0 is "unknown": bytes stand in for every unseen character


_CACHE: dict[str, SentencePieceText] = {}


def _trained(model_type: str) -> SentencePieceText:
    if model_type not in _CACHE:
        _CACHE[model_type] = SentencePieceText.fit(
            [r.text for r in recordings()], TextConfig(320, model_type)
        )
    return _CACHE[model_type]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_round_trip_of_any_string(string):
    text = _trained("bpe")
    assert text.decode(text.encode(string)) == string


def test_known_words_are_short(text):
    """Training had an effect: a transcript costs fewer ids than it has characters."""
    sentence = "please wait while i connect your call"
    assert len(text.encode(sentence)) < 0.75 * len(sentence)


def test_vocabulary_is_clipped_to_the_texts():
    text = SentencePieceText.fit([r.text for r in recordings()], TextConfig(vocab_size=50000))
    assert 280 < text.vocab_sizes[0] < 600
    assert text.decode(text.encode("thank you")) == "thank you"


def test_vocabulary_too_small_names_the_least():
    with pytest.raises(
        TokenizerError, match=r"have 27 different characters, so vocab_size must be at least 284, got 260"
    ):
        SentencePieceText.fit(["abcdefghijklmnopqrstuvwxyz "], TextConfig(vocab_size=260))


def test_a_single_short_text_is_enough():
    text = SentencePieceText.fit(["hi"])
    assert [text.decode(text.encode(s)) for s in STRINGS] == STRINGS


def test_fit_is_deterministic_and_saves(tmp_path, text):
    again = SentencePieceText.fit([r.text for r in recordings()], TextConfig(vocab_size=320))
    assert again.fingerprint == text.fingerprint
    text.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceText) and loaded.fingerprint == text.fingerprint
    np.testing.assert_array_equal(loaded.encode("agent logged in"), text.encode("agent logged in"))
    (tmp_path / "sentencepiece.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_refusals(text):
    with pytest.raises(TokenizerError, match="no text to train on"):
        SentencePieceText.fit(["", "  \n"])
    with pytest.raises(TokenizerError, match="expected a string, got bytes"):
        text.encode(b"bytes")
    with pytest.raises(TokenizerError, match="character 2 is a lone surrogate"):
        text.encode("ab\ud800")
    with pytest.raises(TokenizerError, match=r"id 320 at frame 1, stream 0 is outside \[0, 320\)"):
        text.decode(np.array([5, 320]))
    with pytest.raises(ConfigError, match="model_type"):
        TextConfig(model_type="words")
    with pytest.raises(ConfigError, match="vocab_size"):
        TextConfig(vocab_size=100)


@pytest.fixture
def hf_folder(tmp_path):
    """A byte-level BPE as Llama-like models use it, trained on the recordings' transcripts, in Hugging Face's
    format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([r.text for r in recordings()], vocab_size=300, special_tokens=["<s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>")
    fast.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_hugging_face_round_trip(hf_folder, tmp_path):
    text = HuggingFaceText.from_folder(hf_folder)
    for string in STRINGS:
        assert text.decode(text.encode(string)) == string
    text.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert isinstance(loaded, HuggingFaceText) and loaded.fingerprint == text.fingerprint
    assert loaded.vocab_sizes == text.vocab_sizes
    np.testing.assert_array_equal(loaded.encode("agent logged in"), text.encode("agent logged in"))


def test_hugging_face_refusals(tmp_path):
    with pytest.raises(TokenizerError, match="is not a folder"):
        HuggingFaceText.from_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="holds no tokenizer that transformers can read"):
        HuggingFaceText.from_folder(tmp_path / "empty")


def test_separators_of_unicode_are_characters_of_the_text():
    """Only line feeds and carriage returns end a training line; other separators are characters of pieces."""
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1eeight\ufeff"
    tokenizer = SentencePieceText.fit([text] * 4, TextConfig(vocab_size=330))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("\u2028")) == 1  # a piece, not its three bytes
    lines = SentencePieceText.fit(["ab\nab", "ab\r\nab"] * 4, TextConfig(vocab_size=270))
    same = SentencePieceText.fit(["ab"] * 16, TextConfig(vocab_size=270))
    assert lines.fingerprint == same.fingerprint
