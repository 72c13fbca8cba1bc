"""What a step costs besides the model's products: nothing that grows with streams, and no copies of the cache."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from benchmarks.generation.decode import check
from benchmarks.generation.models import build
from python_tests.generation.conftest import make_model
from python_tests.generation.tools import make_prompt, random_content
from speechlm_ext.generation import SamplingSettings
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.layout import TokenLayout

TTS = "codec_ssl_plain_tts"


def calls_of_a_step(num_codebooks: int, num_requests: int) -> Counter[str]:
    """Python and C calls of one step in the middle of speech, by name."""
    layout = TokenLayout.build(ssl=11, codec=[8] * num_codebooks, text=20, delays=[0, *[1] * num_codebooks])
    model, rng = make_model(layout, tasks=(TTS,)), np.random.default_rng(0)
    engine = Engine(model, num_requests)
    for n in range(num_requests):
        text = random_content(layout, "text_bpe", 5, rng)
        settings = SamplingSettings(seed=n, min_len=20, max_len=20)
        engine.admit([DecodeJob(n, make_prompt(layout, TTS, [text], settings=settings))])
    for _ in range(4):
        engine.step()
        engine.collect()
    seen: Counter[str] = Counter()

    def count(frame, event, argument):
        if event == "call":
            seen[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            seen[f"{getattr(argument, '__module__', '')}.{argument.__name__}"] += 1

    sys.setprofile(count)
    try:
        engine.step()
        engine.collect()
    finally:
        sys.setprofile(None)
    return seen


def test_no_python_work_grows_with_streams():
    few, many = calls_of_a_step(2, 3), calls_of_a_step(16, 3)
    assert sum(few.values()) > 100
    assert {name: (few[name], many[name]) for name in few | many if few[name] != many[name]} == {}


def test_the_cache_is_given_once(monkeypatch):
    """Room for all that the requests may say is made when they join; no step moves keys and values."""
    layout, rng = TokenLayout.build(ssl=11, codec=(7, 8), text=20), np.random.default_rng(0)
    model = make_model(layout, tasks=(TTS,), positions=256)
    engine = Engine(model, 2)
    text = random_content(layout, "text_bpe", 5, rng)
    settings = SamplingSettings(min_len=100, max_len=100)
    prompt = make_prompt(layout, TTS, [text], settings=settings)
    engine.admit([DecodeJob(0, prompt)])
    stores = [store.data_ptr() for store in engine._cache.stores()]
    while engine.active:
        engine.step()
        ((_, decoded),) = engine.collect() or [(None, None)]
    assert len(decoded.content_TS) == 100
    assert [store.data_ptr() for store in engine._cache.stores()] == stores


def test_the_benchmark_compares_equals(monkeypatch):
    """Its reference loop says what the engine says, and it notices when that is not so."""
    model = build("smoke", "cpu")
    check(model)
    from speechlm_ext.generation.engine import sampler_state as state

    monkeypatch.setattr(state, "_temperatures", lambda settings, num_streams: [5.0] * num_streams)
    with pytest.raises(AssertionError, match="differ"):
        check(model)
