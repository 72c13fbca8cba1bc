"""Several results of one request, and targets that are given: one prefill, and the values of the plain form."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import make_model, make_wave
from python_tests.generation.tools import decode, make_layout, make_prompt, random_content
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests import results_folder as records
from speechlm_ext.generation.requests.prompt import build_prompt
from speechlm_ext.tokenizers import TokenizerSet

TTS = "codec_ssl_plain_tts"


def test_samples_are_those_of_the_seeds(model):
    settings = SamplingSettings(n_best=5, max_len=8, seed=3)
    beside = GenerationRequest("asr", "asr", audio=make_wave(0.3), settings=SamplingSettings(max_len=4))
    several = GenerationRequest("a", TTS, text="one two", settings=settings)
    singles = [dataclasses.replace(settings, n_best=1, seed=3 + number) for number in range(5)]
    expected = [generate(model, [dataclasses.replace(several, settings=s)], 1)[0] for s in singles]
    for batch_size in (1, 2, 4, 16):
        got, _ = generate(model, [several, beside], batch_size)
        results = [got, *got.alternatives]
        assert len(results) == 5 and all(r.alternatives == () for r in got.alternatives)
        for number, (one, alone) in enumerate(zip(results, expected, strict=True)):
            np.testing.assert_array_equal(one.ids, alone.ids)
            np.testing.assert_allclose(one.wav, alone.wav, atol=1e-6)
            assert one.logprob == pytest.approx(alone.logprob, abs=1e-3) and one.settings.seed == 3 + number
    assert len({r.ids.tobytes() for r in results}) > 1


def test_the_prompt_is_tokenized_and_prefilled_once(tokenizers, monkeypatch):
    """However few slots there are: a try that joins later takes the rows of one that is still being decoded."""
    model = make_model(tokenizers.make_layout("t"), tokenizers)
    encoded, rows = [], []
    encode, prefill = TokenizerSet.encode_codec_ssl, model.prefill
    monkeypatch.setattr(TokenizerSet, "encode_codec_ssl", lambda *a: encoded.append(1) or encode(*a))
    model.prefill = lambda ids, *rest: rows.append(len(ids)) or prefill(ids, *rest)
    settings = SamplingSettings(n_best=6, max_len=150, temperature=3.0)
    request = GenerationRequest("a", "asr", audio=make_wave(0.4), settings=settings)
    for batch_size in (2, 3, 16):
        encoded.clear(), rows.clear()
        (result,) = generate(model, [request], batch_size)
        lengths = {len(r.ids) for r in (result, *result.alternatives)}
        assert len(lengths) > 1  # they end at different times, so that some go on while others join
        assert len(encoded) == 1 and len(rows) == 1


def test_a_prefill_is_shared_with_a_request_in_the_middle(model):
    """The rows that it has said since are not taken over."""
    layout, rng = make_layout(), np.random.default_rng(1)
    real = make_model(layout, tasks=(TTS,))
    text = random_content(layout, "text_bpe", 7, rng)
    prompts = [
        make_prompt(layout, TTS, [text], settings=SamplingSettings(seed=s, temperature=2.0, min_len=8))
        for s in range(3)
    ]
    engine = Engine(real, 3)
    found = {}
    for number, prompt in enumerate(prompts):
        engine.admit([DecodeJob(number, prompt)])
        for _ in range(3):
            engine.step()
            found |= {w.key: d for w, d in engine.collect()}
    while engine.active:
        engine.step()
        found |= {w.key: d for w, d in engine.collect()}
    for number, prompt in enumerate(prompts):
        (alone,) = decode(real, [prompt])
        np.testing.assert_array_equal(found[number].rows_RS, alone.rows_RS)
        np.testing.assert_allclose(found[number].logprob_TS, alone.logprob_TS, atol=1e-4)


def test_beam_search_gives_its_best_in_order(model):
    settings = SamplingSettings(beam_size=4, n_best=3, max_len=6)
    request = GenerationRequest("a", "asr", audio=make_wave(0.3), settings=settings)
    (result,) = generate(model, [request])
    results = [result, *result.alternatives]
    scores = [r.logprob / r.num_scored for r in results]
    assert len({r.ids.tobytes() for r in results}) == 3 and scores == sorted(scores, reverse=True)
    (best,) = generate(
        model, [dataclasses.replace(request, settings=dataclasses.replace(settings, n_best=1))]
    )
    np.testing.assert_array_equal(result.ids, best.ids)


def test_records_keep_all_results(model, tmp_path):
    request = GenerationRequest(
        "a", TTS, text="one", settings=SamplingSettings(n_best=3, min_len=4, max_len=4)
    )
    (result,) = generate(model, [request])
    folder = records.ResultsFolder(tmp_path, "m", "h")
    folder.add(request, result)
    record = folder.records[result.id]
    paths = [record["audio"], *[one["audio"] for one in record["alternatives"]]]
    assert len(set(paths)) == 3 and all((tmp_path / path).is_file() for path in paths)
    for one, kept in zip(result.alternatives, record["alternatives"], strict=True):
        assert kept["ids"] == one.ids.tolist() and kept["settings"]["seed"] == one.settings.seed
    assert folder.is_done(request)
    (tmp_path / paths[2]).unlink()
    assert not folder.is_done(request)


def test_records_are_strict_json(model, tmp_path):
    """An empty try has the score minus infinity, for which JSON has no number."""
    request = GenerationRequest("a", TTS, text="one", settings=SamplingSettings(max_len=2))
    (result,) = generate(model, [request])
    folder = records.ResultsFolder(tmp_path, "m", "h")
    folder.add(request, dataclasses.replace(result, tries=(-1.5, float("-inf"))))
    line = (tmp_path / records.PARTIAL).read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(line, parse_constant=refuse)["tries"] == [-1.5, None]


def test_text_is_sampled_when_several_are_asked_for(model):
    request = GenerationRequest("a", "textlm", settings=SamplingSettings(n_best=2, max_len=20))
    (result,) = generate(model, [request])
    assert not result.settings.greedy and (result.ids.shape, result.ids.tolist()) != (
        result.alternatives[0].ids.shape,
        result.alternatives[0].ids.tolist(),
    )


def test_a_given_target_is_scored_as_it_was_decoded(model):
    """What the model says freely at temperature 1 has the log-probabilities that scoring the same content gives."""
    settings = SamplingSettings(temperature=1.0, seed=5, max_len=12, min_len=0, top_k=10**6)
    asked = [
        GenerationRequest("asr", "asr", audio=make_wave(0.3), settings=settings),
        GenerationRequest("more", "textlm", text="four", settings=settings),
    ]
    freely = generate(model, asked)
    for request, said in zip(asked, freely, strict=True):
        new = said.ids[said.num_given :]
        text = model.tokenizers.text.decode(new)
        if len(new) == 0 or not np.array_equal(model.tokenizers.text.encode(text).ravel(), new.ravel()):
            text = "one two"
            new = model.tokenizers.text.encode(text).reshape(-1, 1)
        given = dataclasses.replace(request, target_text=text, settings=SamplingSettings())
        prompt = build_prompt(given, model)
        want, end = forced_logprobs(model, prompt)
        beside = GenerationRequest("t", TTS, text="one", settings=SamplingSettings(max_len=5))
        scored, _ = generate(model, [given, beside])
        assert scored.finished == "eos" and scored.num_scored == len(new) + 1
        np.testing.assert_array_equal(scored.ids[scored.num_given :], new)
        np.testing.assert_allclose(scored.logprobs[scored.num_given :, 0], want, atol=1e-4)
        assert scored.end_logprob == pytest.approx(end, abs=1e-4)
        assert scored.logprob == pytest.approx(sum(want) + end, abs=1e-3)


def forced_logprobs(model, prompt) -> tuple[list[float], float]:
    """Of a text target's tokens and its end, by one forward over the whole sequence."""
    layout = model.layout
    end = np.full((1, layout.num_streams), layout.pad_id)
    end[0, 0] = layout.sos_eos_id
    ids = torch.from_numpy(np.concatenate([prompt.frames_PS, prompt.target_TS, end]))
    # The streams behind the first have content in the conditions: delay them.
    rows = torch.full((len(ids), layout.num_streams), layout.pad_id)
    for s, delay in enumerate(layout.delays):
        rows[delay:, s] = ids[: len(ids) - delay, s]
    with torch.no_grad():
        hidden = model.hidden(rows, torch.arange(len(rows)), torch.tensor([0, len(rows)], dtype=torch.int32))
    columns = [layout.sos_eos_id, *range(*layout.interval("text_bpe"))]
    log_p = (hidden @ model.head.weight[columns].T).detach().log_softmax(1)
    said = [*prompt.target_TS[:, 0].tolist(), layout.sos_eos_id]
    found = [float(log_p[len(prompt.frames_PS) + t - 1, columns.index(i)]) for t, i in enumerate(said)]
    return found[:-1], found[-1]


def test_a_given_recording_is_scored(model):
    request = GenerationRequest("a", TTS, text="one", target_audio=make_wave(0.3, 2))
    (scored,) = generate(model, [request])
    np.testing.assert_array_equal(scored.ids, model.tokenizers.encode_codec_ssl(make_wave(0.3, 2)))
    assert scored.wav is None and scored.num_scored == scored.ids.size + 1
    assert scored.logprob == pytest.approx(float(scored.logprobs.sum()) + scored.end_logprob, abs=1e-3)
    (other,) = generate(model, [dataclasses.replace(request, text="five")])
    assert other.logprob != pytest.approx(scored.logprob, abs=1e-3)


def test_targets_that_cannot_be_given(model):
    wave = make_wave(0.3)
    cases = [
        ({"task": "asr", "audio": wave, "target_audio": wave}, "ends in text_bpe; give target_text"),
        ({"task": TTS, "text": "one", "target_text": "one"}, "ends in codec_ssl; give target_audio"),
        (
            {"task": TTS, "text": "one", "target_audio": "none.wav"},
            "target_audio: audio file none.wav does not",
        ),
        ({"task": "asr", "audio": wave, "target_text": ""}, "target_text gives no text_bpe tokens"),
        ({"task": "asr", "audio": wave, "target_text": "one two " * 99}, "the model's context is 256"),
        (
            {"task": "asr", "audio": wave, "target_text": "one", "settings": SamplingSettings(n_best=2)},
            "leave out n_best",
        ),
    ]
    for fields, message in cases:
        (result,) = generate(model, [GenerationRequest("a", **fields)])
        assert result.finished == "failed" and message in result.error, result.error
    broken = make_model(model.layout, model.tokenizers, seed=1)
    with torch.no_grad():
        next(broken.backbone.parameters()).fill_(float("nan"))
    (result,) = generate(broken, [GenerationRequest("a", "asr", audio=wave, target_text="one")])
    assert result.finished == "failed" and "not finite" in result.error


@pytest.mark.parametrize("is_moved", [False, True])
def test_keys_that_are_not_finite_stay_with_their_request(tokenizers, is_moved):
    """A given target reads a token whose vector is NaN; what comes into its slot later must not see its rows, not even
    with a weight of 0."""
    model = make_model(tokenizers.make_layout("t"), tokenizers)
    tokens = [
        tokenizers.text.encode(text).ravel().tolist() for text in ("seven seven", "one two three one two")
    ]
    (bad, *_) = set(tokens[0]) - set(tokens[1])
    with torch.no_grad():
        model.embedding.weight[model.layout.interval("text_bpe")[0] + bad] = float("nan")
    long = GenerationRequest(
        "long", "asr", audio=make_wave(0.9), settings=SamplingSettings(min_len=40, max_len=40)
    )
    given = GenerationRequest(
        "given", "asr", audio=make_wave(0.1), target_text="seven seven one two three one two"
    )
    later = [
        GenerationRequest(
            f"later{n}", "textlm", text="one", settings=SamplingSettings(min_len=3, max_len=3, seed=n)
        )
        for n in range(3)
    ]
    # The one that ends first leaves its slot to the given one, whose own slot is then free.
    brief = GenerationRequest("brief", "textlm", text="one", settings=SamplingSettings(min_len=2, max_len=2))
    asked = [brief, given, *later] if is_moved else [long, given, *later]
    results = {r.id: r for r in generate(model, asked, batch_size=2)}
    assert "not finite" in results.pop("given").error
    assert {name: r.error for name, r in results.items() if r.error} == {}
    for request in later:
        (alone,) = generate(model, [request])
        np.testing.assert_array_equal(results[request.id].ids, alone.ids)
