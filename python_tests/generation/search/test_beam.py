"""Beam search against a search of all sequences, and against greedy choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import make_model, make_wave
from python_tests.generation.tools import decode, make_layout, make_prompt, random_content
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation import GenerationRequest, generate
from speechlm_ext.generation.requests.encode_fields import raw_content
from speechlm_ext.generation.requests.prompt import build_prompt
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.generation.search.beam import beam_search
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import delay_pack


@pytest.mark.parametrize("delays", [None, (1, 0, 2)])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("least, most", [(0, 3), (2, 3), (3, 3)])
def test_a_wide_beam_finds_the_best_of_all(delays, penalty, least, most):
    """Every sequence of four words up to three tokens, scored by the packed forward."""
    layout, rng = TokenLayout.build(codec=(3, 3, 3), text=4, delays=delays), np.random.default_rng(0)
    model = make_model(layout, tasks=("asr",), seed=2)
    condition = random_content(layout, "codec", 4, rng)
    settings = SamplingSettings(greedy=True, min_len=least, max_len=most)
    prompt = make_prompt(layout, "asr", [condition], settings=settings)
    start, _ = layout.interval("text_bpe")
    P, columns = len(prompt.frames_PS), [layout.sos_eos_id, *range(start, start + 4)]
    sequences = [ids for count in range(least, most + 1) for ids in itertools.product(range(4), repeat=count)]
    samples = []
    for ids in sequences:
        frames = np.full((len(ids) + 1, 3), layout.pad_id)
        frames[:, 0] = [*(start + np.array(ids, dtype=np.int64)), layout.sos_eos_id]
        samples.append(torch.from_numpy(np.concatenate([prompt.frames_PS, frames])))
    batch = delay_pack(samples, delays=layout.delays, pad_ids=[layout.pad_id] * 3)
    with torch.no_grad():
        hidden = model.hidden(batch.ids, batch.position, batch.cu_seqlens)
        all_logits = (hidden @ model.head.weight[columns].T).double()
    scored = []
    for ids, first in zip(sequences, batch.cu_seqlens.tolist()[:-1], strict=True):
        row = first + P - 1 + layout.delays[0]
        logits = all_logits[row : row + len(ids) + 1].clone()
        logits[:least, 0] = float("-inf")
        logits[most:, 1:] = float("-inf")
        log_p = logits.log_softmax(1)
        total = sum(float(log_p[t, i]) for t, i in enumerate([*(1 + i for i in ids), 0]))
        scored.append((total / (len(ids) + 1) ** penalty, total, ids))
    scored.sort(reverse=True)
    found = beam_search(model, prompt, 64, penalty, num_best=5)
    for one, (_, total, said) in zip(found, scored, strict=False):
        assert (one.content_TS[:, 0] - start).tolist() == list(said)
        assert one.logprob == pytest.approx(total, abs=1e-4)
        assert one.finished == ("max_len" if len(said) == most else "eos")


@pytest.mark.parametrize("kind", ["codec_ssl", "ssl"])
def test_a_beam_of_one_is_greedy_choice(kind):
    layout, rng = make_layout(kind), np.random.default_rng(1)
    task = "codec_ssl_asr" if kind == "codec_ssl" else "ssl_asr"
    model = make_model(layout, tasks=(task, "textlm"))
    settings = SamplingSettings(greedy=True)
    condition = random_content(layout, kind, 6, rng)
    given = random_content(layout, "text_bpe", 3, rng)
    for prompt in (
        make_prompt(layout, task, [condition], settings=settings, max_new=9),
        make_prompt(layout, "textlm", [], given, settings=settings, max_new=9),
    ):
        (found,), (greedy,) = beam_search(model, prompt, 1), decode(model, [prompt])
        np.testing.assert_array_equal(found.content_TS, greedy.content_TS)
        np.testing.assert_allclose(found.logprob_TS, greedy.logprob_TS, atol=1e-4)
        assert (found.finished, found.num_scored) == (greedy.finished, greedy.num_scored)
        best = beam_search(model, prompt, 6, 0.0)[0]
        assert best.logprob + (best.end_logprob if best.finished == "max_len" else 0) >= greedy.logprob - 1e-4


def test_refuses_what_it_cannot_search():
    layout, rng = make_layout(), np.random.default_rng(2)
    model = make_model(layout, tasks=("codec_ssl_plain_tts", "textlm"))
    speech = make_prompt(layout, "codec_ssl_plain_tts", [random_content(layout, "text_bpe", 2, rng)])
    text = make_prompt(layout, "textlm", [])
    with pytest.raises(GenerationError, match="one stream; codec_ssl has more"):
        beam_search(model, speech, 4)
    with pytest.raises(GenerationError, match="beam_size must be from 1"):
        beam_search(model, text, 0)
    with pytest.raises(GenerationError, match="at least 3 for as many results"):
        beam_search(model, text, 2, num_best=3)
    with torch.no_grad():
        model.head.weight[layout.interval("text_bpe")[0]] = float("nan")
    (failed,) = beam_search(model, text, 3)
    assert failed.finished == "failed" and "not finite" in failed.error


def test_requests_ask_for_a_beam(tokenizers):
    """Beside others in one run; equal to the search itself."""
    model = make_model(tokenizers.make_layout("t"), tokenizers)
    wide = SamplingSettings(beam_size=4, length_penalty=0.5, max_len=8)
    asked = [
        GenerationRequest("a", "textlm", text="one two", settings=wide),
        GenerationRequest("b", "textlm", text="three", settings=SamplingSettings(max_len=8)),
        GenerationRequest("c", "codec_ssl_plain_tts", text="three", settings=wide),
        GenerationRequest("d", "asr", audio=make_wave(0.3), settings=wide),
    ]
    a, b, c, d = generate(model, asked)
    for request, result in ((asked[0], a), (asked[3], d)):
        prompt = build_prompt(request, model)
        (one,) = beam_search(model, prompt, 4, 0.5)
        np.testing.assert_array_equal(raw_content(one.content_TS, "text_bpe", model.layout), result.ids)
        assert result.logprob == one.logprob and result.text == tokenizers.text.decode(result.ids)
    assert b.error is None and "one stream" in c.error
    for bad in ({"temperature": 0.7}, {"top_k": 3}, {"greedy": True}, {"guidance": 2.0}, {"best_of": 2}):
        with pytest.raises(GenerationError, match="beam search"):
            SamplingSettings(beam_size=2, **bad)
    with pytest.raises(GenerationError, match="beam_size must be an integer from 1 to 1024, got 0"):
        SamplingSettings(beam_size=0)
