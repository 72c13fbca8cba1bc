"""The ASR scorer: clips that it decodes again, and the languages that it knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from python_tests.assets import recordings
from speechlm_ext.audio.files import read_audio
from speechlm_ext.errors import ConfigError
from speechlm_ext.evaluation.asr.scorer import AsrScorer, AsrSettings, Transcript, is_loop, load_asr_scorer
from speechlm_ext.evaluation.asr.weights import AsrUnavailable


def test_a_loop_in_the_short_window_is_decoded_again_in_the_full_one():
    class Fake(AsrScorer):
        def __init__(self):
            self.settings = AsrSettings("fake", "folder", window_s=15.0)
            self.batch_size, self._threads = 8, 2

        def _decode_batch(self, clips, lang):
            texts = ["10, 7, 6, " * 30, "Nine, eleven, nine, eleven.", "", "4, " * 60]
            return [Transcript(text, is_loop(text)) for text in texts]

        def _decode(self, clip, lang, fallback=False):
            text = "10, 7, 60." if clip[0] < 0.15 else ("4, 4." if fallback else "4, " * 50)
            return Transcript(text, is_loop(text))

    waves = [np.full(16000, level, np.float32) for level in (0.1, 0.1, 0.1, 0.2)]
    expected = ["10, 7, 60.", "Nine, eleven, nine, eleven.", "", "4, 4."]
    assert Fake().transcribe(waves, "en", 16000) == expected


def test_a_text_that_is_cut_counts_as_a_loop():
    """Whatever its words: nobody speaks 20 tokens per second."""

    class Model:
        max_length = 448
        is_multilingual = True
        hf_tokenizer = feature_extractor = None
        asked: ClassVar[list[int]] = []

        def transcribe(self, clip, *, max_new_tokens, temperature, **settings):
            self.asked.append(max_new_tokens)
            cut = temperature == 0.0 and clip[0] > 0.15
            tokens = list(range(max_new_tokens if cut else 5))
            return iter([SimpleNamespace(text=" once more " if cut else " nine ", tokens=tokens)]), None

    class Fake(AsrScorer):
        def __init__(self):
            self.settings = AsrSettings("fake", "folder")
            self.batch_size, self._threads, self._model = 8, 1, Model()

        def _load(self, workers):
            return self._model

    waves = [np.full(n, level, np.float32) for n, level in ((16000, 0.1), (32000, 0.2), (60 * 16000, 0.1))]
    assert Fake().transcribe(waves, "en", 16000) == ["nine", "nine", "nine"]
    assert Model.asked == [44, 64, 440, 64]


@pytest.mark.slow
def test_real_recordings_are_transcribed_alike_each_time(tmp_path: Path):
    from speechlm_ext.evaluation.text.word_errors import wer

    try:
        scorer = load_asr_scorer(tmp_path, source="wheels", window_s=10.0)
    except AsrUnavailable as error:
        pytest.skip(str(error))
    chosen = [r for r in recordings() if len(r.text.split()) >= 4]
    waves = [read_audio(r.path, 16000)[0] for r in chosen]
    texts = scorer.transcribe(waves, "en", 16000)
    assert wer([r.text for r in chosen], texts).rate < 0.2
    assert scorer.transcribe(waves, "en", 16000) == texts


def test_an_unknown_language_is_named():
    scorer = AsrScorer.__new__(AsrScorer)
    scorer.settings = AsrSettings("base", "folder")
    assert [scorer.language(t) for t in ("en-US", "EN", "eng", "zh-CN", "nb", "fil")] == [
        *("en", "en", "en", "zh", "no", "tl"),
    ]
    with pytest.raises(ConfigError, match="'xx'.*'pt-BR'"):
        scorer.transcribe([np.zeros(16000, np.float32)] * 2, ["en", "xx"], 16000)


@pytest.mark.parametrize("langs", [["en"], ["en", "de", "en"], ["en", None], None, 5])
def test_each_clip_needs_a_language(langs):
    """A clip without one would give an empty text."""
    scorer = AsrScorer.__new__(AsrScorer)
    scorer.languages = ("en", "de")
    with pytest.raises(ConfigError, match="one language tag such as 'en' for all 2 clips, or one for each"):
        scorer.transcribe([np.zeros(1600, np.float32)] * 2, langs, 16000)
