"""Settings: per stream and per request, lengths relative to the prompt, and values that must not reach the sampler."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from python_tests.generation.conftest import make_model, make_wave
from python_tests.generation.test_generate import CHAIN
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.requests.prompt import build_prompt

TTS = "codec_ssl_plain_tts"


@pytest.fixture(scope="module")
def short_model(tokenizers):
    """A model with a context of 48 rows."""
    return make_model(tokenizers.make_layout("short"), tokenizers, positions=48, num_layers=1)


def serve(model, *settings: SamplingSettings, text: str = "one two three"):
    requests = [GenerationRequest(f"r{i}", TTS, text=text, settings=s) for i, s in enumerate(settings)]
    return generate(model, requests)


def test_streams_have_settings_of_their_own(model):
    """k = 1, a tiny nucleus and temperature 0 are three ways to tie a stream to its most probable code; the one stream
    that is left free differs between seeds."""
    free = {"temperature": [1.0, 1.0, 1.0, 0], "top_k": [200, 1, 200, 200], "top_p": [1.0, 1.0, 1e-9, 1.0]}
    a, b, greedy, same = serve(
        model,
        SamplingSettings(min_len=9, max_len=9, seed=1, **free),
        SamplingSettings(min_len=9, max_len=9, seed=2, **free),
        SamplingSettings(min_len=9, max_len=9, greedy=True),
        SamplingSettings(min_len=9, max_len=9, temperature=[0, 0, 0, 0]),
    )
    np.testing.assert_array_equal(same.ids, greedy.ids)
    assert (a.ids[:, 0] != b.ids[:, 0]).any()
    # Tied by k, by p or by temperature, a stream says the same; untied it does not.
    again, loose = serve(
        model,
        SamplingSettings(min_len=9, max_len=9, seed=1, temperature=[1.0, 0, 0, 0], top_k=200),
        SamplingSettings(min_len=9, max_len=9, seed=1, temperature=1.0, top_k=200),
    )
    np.testing.assert_array_equal(again.ids, a.ids)
    assert (loose.ids[:, 1:] != a.ids[:, 1:]).any()


def test_codec_temperature_is_a_list_of_temperatures(model):
    one, other = serve(
        model,
        SamplingSettings(max_len=9, seed=3, temperature=0.7, codec_temperature=0.2),
        SamplingSettings(max_len=9, seed=3, temperature=[0.7, 0.2, 0.2, 0.2]),
    )
    np.testing.assert_array_equal(one.ids, other.ids)


@pytest.mark.parametrize("stream", [0, 2])
def test_min_p_and_repetition_of_one_stream(model, stream):
    """min-p 1 is greedy choice in its stream; a penalty changes its stream first, and others only in what follows."""
    base = SamplingSettings(min_len=7, max_len=7, seed=5, temperature=1.0, top_k=200)
    zeros = [0.0 if s == stream else 1.0 for s in range(4)]
    strict = [1.0 if s == stream else 0.0 for s in range(4)]
    one, other = serve(
        model,
        dataclasses.replace(base, min_p=strict),
        dataclasses.replace(base, temperature=zeros),
    )
    np.testing.assert_array_equal(one.ids, other.ids)
    heavy = [5.0 if s == stream else 1.0 for s in range(4)]
    plain, penalised, off = serve(
        model,
        base,
        dataclasses.replace(base, repetition_penalty=heavy, repetition_window=[7] * 4),
        dataclasses.replace(base, repetition_penalty=[1.0] * 4, repetition_window=[7] * 4),
    )
    np.testing.assert_array_equal(off.ids, plain.ids)
    frame_D, stream_D = np.nonzero(penalised.ids != plain.ids)
    row_D = frame_D + np.array(model.layout.delays)[stream_D]
    first = (
        row_D == row_D.min()
    )  # the first row that differs: there only one stream may, the rest follows from it
    assert stream_D[first].tolist() == [stream]
    assert plain.ids[frame_D[first], stream] in plain.ids[: int(frame_D[first][0]), stream]


@pytest.mark.parametrize(
    "name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window"]
)
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_lists_have_a_value_for_each_stream(model, name, count):
    good, bad = serve(model, SamplingSettings(max_len=2), SamplingSettings(**{name: [1] * count}))
    assert good.error is None
    assert bad.finished == "failed"
    assert (
        f"{name} has {count} values, but the model has 4 streams (ssl, codec0, codec1, codec2)" in bad.error
    )


def test_lengths_relative_to_the_prompt(model):
    """The text has as many frames as it has tokens, and the target is a multiple of them, rounded up."""
    count = len(model.tokenizers.text.encode("one two three"))
    for least, most in ((1.5, 1.5), (0.01, 0.01), (2, 3)):
        (result,) = serve(model, SamplingSettings(min_len_ratio=least, max_len_ratio=most, seed=1))
        assert int(np.ceil(least * count)) <= len(result.ids) <= int(np.ceil(most * count))
    (result,) = serve(model, SamplingSettings(min_len_ratio=4, seed=1))
    assert len(result.ids) >= 4 * count
    a, b, c = generate(
        model,
        [
            GenerationRequest("a", TTS, text="one", settings=SamplingSettings(min_len_ratio=9, max_len=2)),
            GenerationRequest(
                "b", TTS, text="one", settings=SamplingSettings(min_len=500, max_len_ratio=0.1)
            ),
            GenerationRequest("c", "codec_ssl_audiolm", settings=SamplingSettings(min_len_ratio=2)),
        ],
    )
    assert "can never end: min_len" in a.error and "(min_len_ratio 9 times the prompt's" in a.error
    assert "can never end: min_len 500 is more than max_len 1 (max_len_ratio 0.1 times" in b.error
    assert "min_len_ratio needs a prompt with content; give min_len" in c.error


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 1e-300}, "temperature must be a finite number from 0.001 to 1000, got"),
        ({"temperature": 1e300}, "temperature must be a finite number from 0.001 to 1000, got"),
        ({"temperature": 10**400}, "temperature must be a finite number from"),
        ({"temperature": [1, "a"]}, "temperature must be 0 or a finite number from 0.001 to 1000, got 'a'"),
        (
            {"temperature": [1, float("nan")]},
            "temperature must be 0 or a finite number from 0.001 to 1000, got nan",
        ),
        ({"temperature": [1, 1], "codec_temperature": 0.5}, "leave codec_temperature out"),
        ({"codec_temperature": 1e300}, "codec_temperature must be 0 or a finite number from"),
        ({"top_k": [1, 0]}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": [1, 1.5]}, "top_p must be a finite number greater than 0 and at most 1, got 1.5"),
        ({"greedy": 1}, "greedy must be true or false"),
        ({"beam_size": 10**6}, "beam_size must be an integer from 1 to 1024, got 1000000"),
        ({"best_of": 10**9}, "best_of must be an integer from 1 to 1024"),
        ({"n_best": 0}, "n_best must be an integer from 1 to 1024, got 0"),
        ({"n_best": 10**9}, "n_best must be an integer from 1 to 1024, got 1000000000"),
        ({"n_best": 2, "greedy": True}, "greedy gives one result"),
        ({"n_best": 3, "beam_size": 2}, "n_best 3 needs a beam_size of at least as many"),
        ({"n_best": 2, "best_of": 2}, "n_best and best_of are both given"),
        ({"beam_size": 2, "length_penalty": 1e308}, "length_penalty must be a finite number from -10 to 10"),
        ({"min_len": 2, "min_len_ratio": 1.0}, "min_len and min_len_ratio are both given"),
        ({"min_len_ratio": 0}, "min_len_ratio must be a finite number greater than 0, got 0"),
        ({"min_len_ratio": 3, "max_len_ratio": 2}, "can never end: min_len_ratio 3"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(GenerationError, match=message):
        SamplingSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2**40, "temperature": 1.0},
        {"top_p": 1e-300, "temperature": 1.0},
        {"repetition_penalty": 2.0, "repetition_window": 2**50},
        {"max_len": 10**30},
        {"max_len_ratio": 1e308},
        {"min_len": 10**30, "max_len": 10**31},
        {"min_len_ratio": 1e308},
        {"seed": 2**63 - 1, "n_best": 3, "temperature": 1.0},
    ],
)
@pytest.mark.parametrize("task", ["textlm", TTS])
def test_numbers_beyond_the_sampler_stop_no_batch(short_model, settings, task):
    requests = [
        GenerationRequest("odd", task, text="one", settings=SamplingSettings(**settings)),
        GenerationRequest("other", "textlm", text="one", settings=SamplingSettings(max_len=3)),
    ]
    odd, other = generate(short_model, requests)
    assert other.finished in ("eos", "max_len")
    assert odd.finished != "failed" or "context is 48" in odd.error


def test_a_chain_with_an_endless_length(tokenizers):
    """All targets of a chain are cut to what the context holds, whatever was asked: so much memory is taken."""
    layout = tokenizers.make_layout("t")
    chained = make_model(layout, tokenizers, positions=64)
    object.__setattr__(chained.config, "tasks", (CHAIN,))
    request = GenerationRequest("a", "chain", text="one", settings=SamplingSettings(max_len=10**30, seed=1))
    prompt = build_prompt(request, chained)
    assert [segment.max_new < 64 for segment in prompt.segments] == [True, True]
    (result,) = generate(chained, [request])
    assert result.error is None and len(result.chain[0]) + len(result.ids) < 64


def test_values_come_back_in_the_result(model):
    (result,) = serve(model, SamplingSettings(max_len=2, temperature=[1, 0.5, 0.5, 0.5]))
    assert result.settings.temperature == (1, 0.5, 0.5, 0.5) and result.settings.top_k == 30
    arrays = SamplingSettings(temperature=np.array([1, 0.5, 0.5, 0.5], np.float32))
    assert arrays.temperature == (1.0, 0.5, 0.5, 0.5)
    assert dataclasses.asdict(arrays)["temperature"] == (1.0, 0.5, 0.5, 0.5)


def test_requests_refuse_what_they_cannot_hold():
    for fields, message in (
        ({"text": "\ud800"}, "lone surrogate"),
        ({"audio": "a\0.wav"}, "zero byte"),
        ({"audio": make_wave(0.1), "audio_rate": 0}, "audio_rate must be an integer of at least 1"),
        ({"audio": make_wave(0.1), "audio_rate": 16000.0}, "audio_rate must be an integer"),
        ({"resample": "no"}, "resample must be true or false"),
    ):
        with pytest.raises(GenerationError, match=message):
            GenerationRequest("a", "asr", **fields)


def test_more_rows_than_there_is_work_for_take_no_memory(model):
    request = GenerationRequest("a", "textlm", text="one", settings=SamplingSettings(max_len=2))
    (result,) = generate(model, [request], batch_size=10**9)
    assert result.error is None and generate(model, [], batch_size=10**9) == []
    for batch_size in (0, 2.5, "4", True):
        with pytest.raises(GenerationError, match="batch_size must be an integer of at least 1"):
            generate(model, [request], batch_size=batch_size)
    with pytest.raises(GenerationError, match=r"requests\[1\] must be a GenerationRequest, got dict"):
        generate(model, [request, {"id": "b"}])


@pytest.mark.parametrize("kind", [object, complex, bool])
def test_waveforms_that_are_no_numbers(model, kind):
    results = generate(
        model,
        [
            GenerationRequest("a", "asr", audio=np.ones(4000, kind), settings=SamplingSettings(max_len=2)),
            GenerationRequest("b", "asr", audio=make_wave(0.3), settings=SamplingSettings(max_len=2)),
        ],
    )
    assert "samples must be floats in [-1, 1] or integer PCM" in results[0].error and results[1].error is None


@pytest.mark.parametrize(
    "large, huge",
    [
        ({"top_k": 1000}, {"top_k": 2**32 + 1}),
        ({"repetition_window": 1000}, {"repetition_window": 2**32 + 1}),
    ],
)
def test_counts_do_not_wrap(model, large, huge):
    """In 32 bits both would be 1."""
    base = {
        "seed": 4,
        "temperature": 1.5,
        "repetition_penalty": 3.0,
        "min_len": 9,
        "max_len": 9,
        "top_k": 200,
    }
    one, other, wrapped = serve(
        model,
        SamplingSettings(**base | large),
        SamplingSettings(**base | huge),
        SamplingSettings(**base | dict.fromkeys(huge, 1)),
    )
    np.testing.assert_array_equal(one.ids, other.ids)
    assert (wrapped.ids != one.ids).any()
