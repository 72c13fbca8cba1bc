"""Recognition of arriving audio: partial results are the offline ones of the audio so far; little is read twice."""

from __future__ import annotations

import numpy as np
import pytest

from python_tests.generation.conftest import make_model, make_wave
from speechlm_ext.errors import AudioError, GenerationError
from speechlm_ext.generation import GenerationRequest, GenerationResult, SamplingSettings
from speechlm_ext.generation.live.listen import _common_words

SHORT = SamplingSettings(max_len=12)
WAVE = np.concatenate([make_wave(0.5, 1), make_wave(0.5, 2)])


@pytest.fixture(scope="module")
def listening(tokenizers):
    return make_model(tokenizers.make_layout("t"), tokenizers, positions=1024)


@pytest.fixture(scope="module")
def offline(listening):
    """Results of ``generate`` for the first seconds of ``WAVE``."""
    return {
        seconds: listening.generate(
            [GenerationRequest("a", "asr", audio=WAVE[: int(seconds * 16000)], settings=SHORT)]
        )[0]
        for seconds in (0.25, 0.5, 0.75, 1.0)
    }


@pytest.mark.parametrize("pieces", [[4000] * 4, [1, 15999], [16000], [700] * 22 + [600]])
def test_partial_results_are_those_of_the_audio_so_far(listening, offline, pieces):
    listener = listening.listen("asr", chunk_seconds=0.25, settings=SHORT)
    rows, prefill = [], listening.prefill
    listening.prefill = lambda ids, *rest: rows.append(len(ids)) or prefill(ids, *rest)
    partials, at = [], 0
    for count in pieces:
        partials += listener.push(WAVE[at : at + count])
        at += count
    result = listener.finish()
    del listening.prefill
    assert at == len(WAVE) == 16000
    assert {p.seconds: p.text for p in partials} == {s: whole.text for s, whole in offline.items()}
    np.testing.assert_array_equal(result.ids, offline[1.0].ids)
    assert result.logprob == pytest.approx(offline[1.0].logprob, abs=1e-3) and result.seconds > 0
    # Five prompts, of which each reads little more than what was not there before.
    frames = len(listening.tokenizers.encode_codec_ssl(WAVE))
    assert sum(rows) < 2 * frames + 5 * 8


def test_stable_words_are_never_taken_back(listening, monkeypatch):
    said = [
        "one",
        "one two thr",
        "one two three",
        "one two three four",
        "six two three four",
        "six two",
        "one two",
    ]
    listener = listening.listen("asr", chunk_seconds=0.1)
    texts = iter(said)
    monkeypatch.setattr(
        listener, "_transcribe", lambda wave: GenerationResult("a", "asr", "eos", text=next(texts))
    )
    found = [p.stable for p in listener.push(make_wave(0.7))]
    assert found == ["", "one", "one two", "one two three", "one two three", "one two three", "one two three"]


def test_a_listener_can_be_used_again(listening):
    listener = listening.listen("asr", chunk_seconds=9.0, settings=SHORT)
    texts = []
    for seed in (1, 2, 1):
        assert listener.push(make_wave(0.3, seed)) == []
        result = listener.finish()
        texts.append((result.ids.tolist(), round(result.logprob, 3)))
    assert texts[0] == texts[2] != texts[1]


def test_common_words():
    assert _common_words("one two thr", "one two three four") == "one two"
    assert _common_words("one  two", "one  two") == "one  two"
    assert _common_words("", "one") == _common_words("two", "one") == ""


def test_bad_use(listening):
    for task, options, message in [
        ("codec_ssl_plain_tts", {}, "does not turn one recording into text"),
        ("textlm", {}, "does not turn one recording into text"),
        ("sing", {}, "not one that the model was trained for"),
        ("asr", {"chunk_seconds": 0.0}, "chunk_seconds must be a finite number greater than 0, got 0.0"),
        ("asr", {"chunk_seconds": "1"}, "chunk_seconds must be a finite number greater than 0, got '1'"),
        ("asr", {"settings": SamplingSettings(beam_size=2)}, "takes no guidance"),
        ("asr", {"settings": SamplingSettings(n_best=2)}, "leave n_best out"),
        ("asr", {"settings": {"max_len": 2}}, "must be SamplingSettings, got dict"),
    ]:
        with pytest.raises(GenerationError, match=message):
            listening.listen(task, **options)
    listener = listening.listen("asr", chunk_seconds=0.1)
    with pytest.raises(GenerationError, match="there is no audio"):
        listener.finish()
    with pytest.raises(AudioError, match="samples pushed to a listener"):
        listener.push(np.full(100, np.nan, np.float32))
    assert listener.push(np.empty(0, np.float32)) == []


def test_agreement_in_scripts_without_spaces_is_by_grapheme_cluster():
    assert _common_words("你好吗", "你好嘛 a") == "你好"
    assert _common_words("กิน", "กันข้าว") == ""  # the first letter's vowel differs
    assert _common_words("กินข้", "กินข้าว") == "กินข้"
    assert _common_words("नमस्ते दु", "नमस्ते दुनिया") == "नमस्ते"
