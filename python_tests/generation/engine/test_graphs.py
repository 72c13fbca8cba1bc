"""Captured steps: the tokens of eager ones, and no capture while somebody listens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import make_model
from python_tests.generation.engine.recorded_graphs import captures, make_engine
from python_tests.generation.engine.test_slots import TASKS, prompts_of
from python_tests.generation.tools import decode, make_layout, make_prompt, random_content
from speechlm_ext.generation.engine.capture import GraphCapture
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.memory import MOST_ROWS, rows_at_start
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.request import SamplingSettings

MODE = "thread_local"


def tts(layout, rng, name="r", length=40, words=6, **settings):
    settings = SamplingSettings(top_k=5, seed=7, min_len=length, max_len=length, **settings)
    return make_prompt(
        layout, TASKS[0], [random_content(layout, "text_bpe", words, rng)], settings=settings, name=name
    )


def finish(engine: Engine) -> dict:
    found = {}
    while engine.active:
        engine.step()
        found |= {job.key: decoded for job, decoded in engine.collect()}
    return found


def assert_same(found, wanted) -> None:
    np.testing.assert_array_equal(found.rows_RS, wanted.rows_RS)
    np.testing.assert_allclose(found.logprob_TS, wanted.logprob_TS, atol=1e-4)


def test_a_stream_captures_its_step_before_its_first_row(recorded):
    """One graph serves the whole stream, and those of other lengths after it."""
    layout, rng = make_layout(), np.random.default_rng(0)
    model = make_model(layout, tasks=TASKS)
    engine = make_engine(model, 1)
    for length in (40, 3, 17):
        prompt = tts(layout, rng, length=length)
        engine.admit([DecodeJob(0, prompt)])
        assert [n for n, _ in engine._graphs.sizes] == [1]
        recorded[:] = [(0, MODE)] if length == 40 and recorded == [(0, MODE)] else []
        (found,) = finish(engine).values()
        assert captures(recorded) == ([(0, MODE)] if length == 40 else [])
        assert recorded.count("replay") > length, "every step is a replay"
        assert_same(found, decode(model, [prompt])[0])


def test_several_requests_capture_every_number_that_can_be_left(recorded):
    layout, rng = make_layout(), np.random.default_rng(1)
    model = make_model(layout, tasks=TASKS)
    prompts = [tts(layout, rng, f"r{n}", length=3 + n) for n in range(3)]
    engine = make_engine(model, 4)
    engine.admit([DecodeJob(n, prompt) for n, prompt in enumerate(prompts)])
    assert {n for n, _ in engine._graphs.sizes} == {1, 2, 4}
    recorded.clear()
    found = finish(engine)
    assert set(recorded) == {"replay"}
    for number, prompt in enumerate(prompts):
        assert_same(found[number], decode(model, [prompt])[0])


def test_guidance_never_leaves_one_row(recorded):
    layout, rng = make_layout("codec"), np.random.default_rng(2)
    model = make_model(layout, tasks=("plain_tts",))
    text = random_content(layout, "text_bpe", 7, rng)
    prompt = make_prompt(
        layout, "plain_tts", [text], settings=SamplingSettings(guidance=2.0, seed=3), max_new=6
    )
    bare = np.concatenate([prompt.frames_PS[:2], prompt.frames_PS[-1:]])
    object.__setattr__(prompt, "unconditional_PS", bare)
    engine = make_engine(model, 2)
    engine.admit([DecodeJob(0, prompt)])
    assert {n for n, _ in engine._graphs.sizes} == {2}
    assert_same(finish(engine)[0], decode(model, [prompt])[0])


def test_nothing_is_captured_while_a_stream_runs(recorded):
    """A longer request that joins, and a new number of requests, run without graphs until nobody listens."""
    layout, rng = make_layout(), np.random.default_rng(3)
    model = make_model(layout, tasks=TASKS)
    short, long = tts(layout, rng, "short", 20), tts(layout, rng, "long", 60)
    engine = make_engine(model, 2)
    engine.admit([DecodeJob("short", short)])
    for _ in range(5):
        engine.step()
    before = captures(recorded)
    engine.admit([DecodeJob("long", long)])
    found = finish(engine)
    assert captures(recorded) == before
    for prompt in (short, long):
        assert_same(found[prompt.id], decode(model, [prompt])[0])
    engine.admit([DecodeJob("long", long)])
    assert len(captures(recorded)) > len(before)
    assert_same(finish(engine)["long"], decode(model, [long])[0])


def test_a_step_may_capture_only_when_told(recorded):
    """The same engine, request by request: a step that recurs is captured if the caller allows it."""
    layout, rng = make_layout(), np.random.default_rng(4)
    model = make_model(layout, tasks=TASKS)
    for may_capture in (False, True):
        engine = make_engine(model, 1)
        engine.admit([DecodeJob(0, tts(layout, rng))], prepare=False)
        for _ in range(6):
            engine.step(may_capture)
        assert bool(recorded) == may_capture
        assert recorded[:2] in ([], [(0, MODE), "replay"])


@pytest.mark.parametrize("num_slots", [3, 8])
def test_a_batch_captures_sizes_that_recur(recorded, num_slots):
    """Requests of all tasks that come and go: the tokens of eager steps, most of them from replays."""
    layout, rng = make_layout(), np.random.default_rng(5)
    model, prompts = make_model(layout, tasks=TASKS), prompts_of(layout, 11, rng)
    engine = make_engine(model, num_slots, 2)
    found = {job.key: decoded for job, decoded in engine.run(DecodeJob(n, p) for n, p in enumerate(prompts))}
    assert recorded.count("replay") >= 10 and 1 < len(captures(recorded)) < 40
    for number, prompt in enumerate(prompts):
        assert_same(found[number], decode(model, [prompt])[0])


def test_the_rows_of_an_earlier_turn_are_kept(recorded):
    """Steps are run before they are captured; they write behind the rows that the cache has."""
    layout, rng = make_layout(), np.random.default_rng(6)
    model = make_model(layout, tasks=TASKS)
    prompt = tts(layout, rng, words=21, length=12)
    wanted = decode(model, [prompt])[0]
    engine = make_engine(model, 1)
    for num_cached in (0, len(prompt.frames_PS) - 1, 9):
        engine.admit([DecodeJob(0, prompt)], num_cached)
        assert_same(finish(engine)[0], wanted)
        engine._graphs.forget()


def test_the_rows_of_an_earlier_turn_are_kept_beside_a_short_request(recorded):
    """Whose steps may have fewer keys than the other one has rows."""
    layout, rng = make_layout(), np.random.default_rng(11)
    model = make_model(layout, tasks=TASKS)
    long, short = tts(layout, rng, words=45, length=12), tts(layout, rng, "short", words=2, length=30)
    engine = make_engine(model, 2)
    engine.admit([DecodeJob("long", long)])
    assert_same(finish(engine)["long"], decode(model, [long])[0])
    engine._graphs.forget()
    engine.admit([DecodeJob("long", long), DecodeJob("short", short)], len(long.frames_PS) - 1)
    found = finish(engine)
    for name, prompt in (("long", long), ("short", short)):
        assert_same(found[name], decode(model, [prompt])[0])


def test_memory_that_grows_costs_the_graphs_and_their_pool(recorded):
    layout, rng = make_layout(), np.random.default_rng(8)
    model = make_model(layout, tasks=TASKS, positions=1024)
    engine = make_engine(model, 1)
    for pool, length in enumerate((10, 300)):
        prompt = tts(layout, rng, length=length)
        engine.admit([DecodeJob(0, prompt)])
        assert_same(finish(engine)[0], decode(model, [prompt])[0])
        assert captures(recorded)[-1] == (pool, MODE)


def test_memory_is_allocated_when_a_request_joins(recorded):
    """No step in the middle of a stream grows the cache."""
    layout, rng = make_layout(), np.random.default_rng(9)
    model = make_model(layout, tasks=TASKS, positions=1024)
    engine = make_engine(model, 1)
    engine.admit([DecodeJob(0, tts(layout, rng, length=300))])
    rows = engine._cache.num_rows
    finish(engine)
    assert engine._cache.num_rows == rows


def test_a_capture_that_fails_is_ended_and_raises(recorded):
    ended = []

    class Graph(torch.cuda.CUDAGraph):
        def capture_end(self):
            ended.append(True)
            super().capture_end()
            raise RuntimeError("the capture is not valid")

    torch.cuda.CUDAGraph = Graph  # the fixture restores it

    def step():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        GraphCapture(torch.device("cpu")).capture(step)
    assert ended == [True]
    assert torch.ones(1).item() == 1


def test_rows_at_start_are_the_formula():
    # 24 layers of 8 heads of 128 for keys and values, 2 bytes each: 96 KiB a row.
    row = 24 * 8 * (128 + 128) * 2
    assert rows_at_start(row, 16, 4096, 80 << 30) == 4096
    assert rows_at_start(row, 16, 131072, 80 << 30) == MOST_ROWS
    affordable = rows_at_start(row, 256, 131072, 80 << 30)
    assert affordable % 256 == 0 and 256 * row * affordable <= (20 << 30) < 256 * row * (affordable + 256)
    assert rows_at_start(row, 1, 1000, 80 << 30) == 1024
    assert rows_at_start(row, 256, 131072, 1) == 256


def test_bytes_of_a_row():
    layout = make_layout()
    model = make_model(layout, tasks=TASKS)
    cache, config = model.new_cache(3, 8), model.backbone.config
    assert cache.row_bytes == 0
    with torch.inference_mode():
        model.step_hidden(torch.zeros(1, layout.num_streams, dtype=torch.int64), cache)
    size = config.hidden_size // config.num_attention_heads
    assert cache.row_bytes == config.num_hidden_layers * config.num_key_value_heads * 2 * size * 4


@pytest.mark.cuda
def test_a_stream_on_a_gpu_replays_what_was_captured_at_its_start():
    layout, rng = make_layout(), np.random.default_rng(10)
    model = make_model(layout, tasks=TASKS).to("cuda")
    prompt = tts(layout, rng)
    engine = Engine(model, 1)
    assert engine._cache.num_rows >= model.max_positions
    engine.admit([DecodeJob(0, prompt)])
    sizes = engine._graphs.sizes
    assert sizes
    found = finish(engine)[0]
    assert engine._graphs.sizes == sizes
    eager = Engine(model, 1, cuda_graphs=False)
    eager.admit([DecodeJob(0, prompt)])
    assert_same(found, finish(eager)[0])
