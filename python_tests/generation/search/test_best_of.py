"""best_of: the tries are those of the seeds, the scores are those of the recognition task, and the best is kept."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from python_tests.data.sequence_oracle import assemble
from python_tests.generation.conftest import make_model
from speechlm_ext.data.sequence import LossWeights
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.engine.sampler_state import _temperatures
from speechlm_ext.generation.search import best_of
from speechlm_ext.ops import delay_pack
from speechlm_ext.tasks import builtin_tasks

ASR = builtin_tasks()["codec_ssl_asr"]


def ask(n: int, seed: int = 5, **settings) -> GenerationRequest:
    sampling = SamplingSettings(seed=seed, best_of=n, temperature=1.0, **{"max_len": 9, **settings})
    return GenerationRequest("a", "codec_ssl_plain_tts", text="one two", settings=sampling)


@torch.no_grad()
def log_p(model, text: str, raw_TC: np.ndarray) -> float:
    """log p(text, end | speech), token by token through a softmax of its own."""
    stored = {
        "id": "u",
        "text_bpe": model.tokenizers.text.encode(text),
        "ssl": raw_TC[:, :1],
        "codec": raw_TC[:, 1:],
    }
    frames, weight = assemble(ASR, stored, model.layout, None, LossWeights())
    pads = [model.layout.pad_id] * model.layout.num_streams
    packed = delay_pack([torch.from_numpy(frames)], delays=model.layout.delays, pad_ids=pads, tail="trim")
    hidden = model.hidden(packed.ids, packed.position, packed.cu_seqlens)
    total = 0.0
    scope = [i for a, b in model.layout.scopes("own")[0] for i in range(a, b)]
    for row in np.flatnonzero(weight[:, 0]):
        logits = (hidden[row - 1] @ model.head.weight.T).double()[scope]
        total += float(torch.log_softmax(logits, 0)[scope.index(int(frames[row, 0]))])
    return total


def test_keeps_the_try_that_is_recognised_best(model):
    single = [generate(model, [ask(1, seed)])[0] for seed in range(5, 11)]
    assert len({r.ids.tobytes() for r in single}) == 6
    (best,) = generate(model, [ask(6)])
    expected = [log_p(model, "one two", r.ids) for r in single]
    assert best.tries == pytest.approx(expected, rel=1e-4)
    ended = [i for i, r in enumerate(single) if r.finished == "eos"] or range(6)
    winner = single[max(ended, key=lambda i: expected[i])]
    np.testing.assert_array_equal(best.ids, winner.ids)
    np.testing.assert_array_equal(best.wav, winner.wav)
    assert best.settings.seed == winner.settings.seed and best.finished == winner.finished


def test_beside_other_requests_and_across_windows(model, monkeypatch):
    monkeypatch.setattr(sys.modules["speechlm_ext.generation.generate"], "WINDOW", 1)
    (alone,) = generate(model, [ask(5)])
    text = GenerationRequest("t", "textlm", text="four", settings=SamplingSettings(max_len=4))
    seen = []
    results = generate(
        model, [text, ask(5), ask(1)], batch_size=3, on_result=lambda i, r: seen.append((i, r.id))
    )
    np.testing.assert_array_equal(results[1].ids, alone.ids)
    assert results[1].tries == pytest.approx(alone.tries, rel=1e-4)
    assert results[0].text is not None and results[2].tries == ()
    assert sorted(seen) == [(0, "t"), (1, "a"), (2, "a")]


def test_an_ended_try_goes_before_a_cut_one_and_an_empty_one_is_last(model):
    (a, b) = (generate(model, [ask(1, seed)])[0] for seed in (5, 6))
    from dataclasses import replace

    cut, ended = replace(a, finished="max_len"), replace(b, finished="eos")
    assert best_of.choose(model, ask(2), [cut, ended]).ids is b.ids
    empty = replace(a, finished="eos", ids=a.ids[:0])
    chosen = best_of.choose(model, ask(2), [empty, ended])
    assert chosen.ids is b.ids and chosen.tries[0] == -math.inf
    failed = replace(a, finished="failed", ids=None, error="x")
    assert best_of.choose(model, ask(2), [failed, cut]).ids is a.ids
    assert best_of.choose(model, ask(2), [failed, failed]).finished == "failed"


def test_codec_temperature_leaves_chance_to_the_first_stream(model):
    def speak(seed, **settings):
        sampling = SamplingSettings(seed=seed, temperature=1.5, max_len=9, min_len=9, **settings)
        return generate(
            model, [GenerationRequest("a", "codec_ssl_plain_tts", text="one two", settings=sampling)]
        )[0].ids

    # With every stream at temperature 0 chance has no say; with codes at 0 only where the units differ.
    free = [speak(seed) for seed in range(4)]
    calm = [speak(seed, codec_temperature=0.0) for seed in range(4)]
    for a, b in zip(free, calm, strict=True):
        assert a[0, 0] == b[0, 0]  # the first unit is drawn alike, before any code can matter
    greedy = generate(
        model,
        [
            GenerationRequest(
                "a", "codec_ssl_plain_tts", text="one two", settings=SamplingSettings(greedy=True, max_len=9)
            )
        ],
    )[0].ids
    cold = speak(0, codec_temperature=0.0, top_k=1)
    assert len({ids.tobytes() for ids in calm}) == 4
    np.testing.assert_array_equal(cold[: len(greedy)], greedy[: len(cold)])
    assert len({ids[:, 1:].tobytes() for ids in free}) == 4
    same_units = [speak(seed, codec_temperature=0.0, top_k=1) for seed in range(4)]
    assert len({ids.tobytes() for ids in same_units}) == 1
    sampled = SamplingSettings(temperature=0.7, codec_temperature=0.2)
    assert _temperatures(sampled, 4) == [0.7, 0.2, 0.2, 0.2]
    assert _temperatures(SamplingSettings(temperature=0.7), 3) == [0.7, 0.7, 0.7]
    assert _temperatures(SamplingSettings(greedy=True, codec_temperature=0.5), 2) == [0.0, 0.0]
    with pytest.raises(GenerationError, match="codec_temperature must be 0 or"):
        SamplingSettings(codec_temperature=-1.0)


def test_needs_recognition(tokenizers):
    speaks = make_model(tokenizers.make_layout("t"), tokenizers, tasks=("codec_ssl_plain_tts", "textlm"))
    (result,) = generate(speaks, [ask(2)])
    assert result.finished == "failed" and "trained to recognize codec_ssl speech" in result.error


def test_bad_settings(model):
    with pytest.raises(GenerationError, match="best_of must be an integer from 1 to 1024, got 0"):
        SamplingSettings(best_of=0)
    with pytest.raises(GenerationError, match="greedy gives one result"):
        SamplingSettings(best_of=2, greedy=True)
    text = GenerationRequest("t", "textlm", text="four", settings=SamplingSettings(best_of=2))
    (result,) = generate(model, [text])
    assert result.finished == "failed" and "does not speak one" in result.error
