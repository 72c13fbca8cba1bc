"""Dialogues: the cache that is kept gives what a fresh prefill gives, for text and speech, any delays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import make_model, make_wave
from speechlm_ext.errors import GenerationError, LayoutError
from speechlm_ext.generation import SamplingSettings
from speechlm_ext.generation.engine.rows import prefix_rows
from speechlm_ext.generation.live.chat import Chat

SAMPLED = SamplingSettings(greedy=False, temperature=1.5, seed=3, max_len=7)


def talk(chat, forget):
    """Text and speech by turns; ``forget`` throws the cache away before each reply."""
    results = []
    for number, (content, modality) in enumerate(
        [
            ("one two", "text_bpe"),
            (make_wave(0.3, 1), "codec_ssl"),
            ("three", "codec_ssl"),
            (None, "text_bpe"),
        ]
    ):
        if isinstance(content, str):
            chat.say(content, role="system" if number == 0 else "user")
        elif content is not None:
            chat.say(audio=content)
        if forget:
            chat._session.cached_RS = chat._session.cached_RS[:0]
        results.append(chat.reply(modality, SAMPLED))
    return results


@pytest.mark.parametrize("delays", [None, (0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 3, 2), (2, 3, 2, 4)])
def test_a_kept_cache_equals_a_fresh_prefill(tokenizers, delays):
    layout = tokenizers.make_layout("t", delays=delays)
    model = make_model(layout, tokenizers, positions=512)
    kept, fresh = Chat(model, "textlm"), Chat(model, "textlm")
    fed = []
    prefill = model.prefill
    model.prefill = lambda ids, *rest: fed.append(len(ids)) or prefill(ids, *rest)
    ours = talk(kept, False)
    few, fed = sum(fed), []
    model.prefill = lambda ids, *rest: fed.append(len(ids)) or prefill(ids, *rest)
    theirs = talk(fresh, True)
    del model.prefill
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.ids, other.ids)
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
        assert mine.finished == other.finished != "failed"
    np.testing.assert_array_equal(kept.frames_TS, fresh.frames_TS)
    # What was read before is not read again.
    assert few < len(kept.frames_TS) + layout.max_delay < sum(fed)
    # The cache itself, row by row.
    rows_RS = prefix_rows(kept.frames_TS, layout)[: len(kept._session.cached_RS)]
    behind = [s for s, d in enumerate(layout.delays) if d >= layout.delays[0]]
    np.testing.assert_array_equal(kept._session.cached_RS[:, behind], rows_RS[:, behind])
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        model.prefill(torch.from_numpy(kept._session.cached_RS), cache, [0], [len(kept._session.cached_RS)])
    for held, whole in zip(kept._session.engine._cache.stores(), cache.stores(), strict=True):
        torch.testing.assert_close(held[0, : len(rows_RS)], whole[0, : len(rows_RS)], rtol=1e-4, atol=1e-5)


def test_the_dialogue_is_what_was_said(tokenizers):
    layout = tokenizers.make_layout("t")
    chat = Chat(make_model(layout, tokenizers), "textlm")
    chat.say("one", role="user")
    reply = chat.reply(settings=SamplingSettings(max_len=3))
    frames = chat.frames_TS[:, 0].tolist()
    start = layout.interval("text_bpe")[0]
    marker, fill = layout.marker_id("text_bpe"), [layout.pad_id] * layout.max_delay
    assert frames == [
        layout.sos_eos_id, layout.task_id("textlm"),
        layout.special_id("user"), marker, *(tokenizers.text.encode("one")[:, 0] + start), *fill,
        layout.special_id("assistant"), marker, *(reply.ids[:, 0] + start), layout.sos_eos_id, *fill,
    ]  # fmt: skip
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    assert reply.text == tokenizers.text.decode(reply.ids)


def test_bad_turns_change_nothing(tokenizers):
    layout = tokenizers.make_layout("t")
    model = make_model(layout, tokenizers, positions=64)
    chat = Chat(model, "textlm")
    chat.say("one")
    before = chat.frames_TS
    for call, error, message in [
        (lambda: chat.say(), GenerationError, "give one of them"),
        (lambda: chat.say("x", role="host"), GenerationError, "system, user, assistant; got 'host'"),
        (lambda: chat.say(""), GenerationError, "no text_bpe tokens"),
        (
            lambda: chat.reply("text_bpe", SamplingSettings(guidance=2.0)),
            GenerationError,
            "takes no guidance",
        ),
        (lambda: chat.reply("text_bpe", SamplingSettings(min_len=99)), GenerationError, "context is 64"),
        (
            lambda: chat.reply("text_bpe", SamplingSettings(beam_size=2)),
            GenerationError,
            "leave beam_size out",
        ),
        (lambda: chat.reply("text_bpe", SamplingSettings(n_best=2)), GenerationError, "leave n_best out"),
        (
            lambda: chat.reply("text_bpe", {"max_len": 3}),
            GenerationError,
            "must be SamplingSettings, got dict",
        ),
        (
            lambda: chat.reply("g2p"),
            GenerationError,
            "one that the model has: text_bpe, codec_ssl, ssl; got 'g2p'",
        ),
        (lambda: chat.say("x", modality="song"), GenerationError, "got 'song'"),
        (lambda: chat.say("\ud800"), GenerationError, "lone surrogate"),
        (lambda: Chat(model, "sing"), LayoutError, "sing"),
        (lambda: Chat(make_model(layout), "textlm"), GenerationError, "the model has no tokenizers"),
    ]:
        with pytest.raises(error, match=message):
            call()
        np.testing.assert_array_equal(chat.frames_TS, before)
    assert chat.reply(settings=SamplingSettings(max_len=4)).finished in ("eos", "max_len")
