"""A model with a frame transformer learns utterances by heart, and says them code for code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from python_tests.generation.tools import make_prompt
from python_tests.training.runs import losses
from speechlm_ext import SpeechLM
from speechlm_ext.data.tokens.folder import TokenFolder
from speechlm_ext.generation import SamplingSettings
from speechlm_ext.generation.engine.engine import decode
from speechlm_ext.generation.requests.encode_fields import content_frames


def test_utterances_learnt_by_heart_are_said(runs: Path) -> None:
    """A few random utterances, which only the previous stream can tell apart."""
    run = runs / "multi-scale" / "by-heart"
    values = losses(run)
    assert values[-1] < 0.1 * values[0]
    model = SpeechLM.from_pretrained(run / "checkpoints" / "latest")
    folder, layout = TokenFolder.open(runs / "three-utterances"), model.layout
    prompts, contents = [], []
    for number in range(3):
        stored = folder.utterance(number)
        speech = np.concatenate([stored["ssl"], stored["codec"]], axis=1)
        contents.append(content_frames(speech, "codec_ssl", layout, "test"))
        text = content_frames(stored["text_bpe"], "text_bpe", layout, "test")
        settings = SamplingSettings(greedy=True, max_len=40)
        prompts.append(make_prompt(layout, "codec_ssl_plain_tts", [text], settings=settings))
    for one, content in zip(decode(model, prompts), contents, strict=True):
        np.testing.assert_array_equal(one.content_TS, content)
        assert one.finished == "eos"
