"""The engine's slots: requests that join and leave, modalities that come later, shared prefills, guidance, scoring."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import make_model
from python_tests.generation.tools import ScriptedModel, decode, make_layout, make_prompt, random_content
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.ops import delay_pack

TASKS = ("codec_ssl_plain_tts", "textlm", "codec_ssl_asr", "ssl_audiolm")


def prompts_of(layout, count, rng, **changes):
    """Requests of all tasks, lengths and settings, one after the other."""
    out = []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        conditions = {
            "codec_ssl_plain_tts": [random_content(layout, "text_bpe", 3 + number, rng)],
            "codec_ssl_asr": [random_content(layout, "codec_ssl", 2 + number % 5, rng)],
        }.get(task, [])
        settings = SamplingSettings(greedy=False, top_k=5, seed=number, **changes)
        out.append(
            make_prompt(
                layout, task, conditions, settings=settings, name=f"r{number}", max_new=3 + number % 7
            )
        )
    return out


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_requests_join_as_others_leave(num_slots):
    """Whatever shares a step with whom, and in whatever order modalities turn up: the same tokens."""
    layout, rng = make_layout(), np.random.default_rng(0)
    model, prompts = ScriptedModel(layout), prompts_of(layout, 13, rng)
    alone = [decode(model, [p])[0] for p in prompts]
    for found, one in zip(decode(model, prompts, num_slots=num_slots), alone, strict=True):
        np.testing.assert_array_equal(found.rows_RS, one.rows_RS)
        np.testing.assert_array_equal(found.logprob_TS, one.logprob_TS)
        assert (found.finished, found.num_scored) == (one.finished, one.num_scored)


@pytest.mark.parametrize("poll", [1, 3, 8])
def test_a_real_model_gives_the_same_in_few_slots(poll):
    layout, rng = make_layout(), np.random.default_rng(1)
    model, prompts = make_model(layout, tasks=TASKS), prompts_of(layout, 9, rng)
    engine = Engine(model, 4, poll_interval=poll)
    found = {
        work.key: decoded for work, decoded in engine.run(DecodeJob(n, p) for n, p in enumerate(prompts))
    }
    assert not engine.active and engine.num_free == 4
    for number, prompt in enumerate(prompts):
        one = decode(model, [prompt])[0]
        np.testing.assert_array_equal(found[number].rows_RS, one.rows_RS)
        np.testing.assert_allclose(found[number].logprob_TS, one.logprob_TS, atol=1e-4)


def test_tries_share_their_prefill_and_nothing_else():
    layout, rng = make_layout(), np.random.default_rng(2)
    model = make_model(layout, tasks=TASKS)
    text = random_content(layout, "text_bpe", 9, rng)
    tries = [
        make_prompt(layout, TASKS[0], [text], settings=SamplingSettings(seed=s, temperature=2.0))
        for s in range(3)
    ]
    rows = []
    prefill = model.prefill
    model.prefill = lambda ids, *rest: rows.append(len(ids)) or prefill(ids, *rest)
    found = decode(model, tries)
    assert rows == [len(tries[0].frames_PS) - 1]
    del model.prefill
    for prompt, one in zip(tries, found, strict=True):
        np.testing.assert_array_equal(one.rows_RS, decode(model, [prompt])[0].rows_RS)
    assert len({one.rows_RS.tobytes() for one in found}) == 3


def test_cancel_frees_the_slot_and_disturbs_nobody():
    layout, rng = make_layout(), np.random.default_rng(3)
    model, prompts = make_model(layout, tasks=TASKS), prompts_of(layout, 4, rng)
    wanted = [decode(model, [p])[0].rows_RS for p in prompts]
    engine = Engine(model, 3)
    engine.admit([DecodeJob(n, p) for n, p in enumerate(prompts[:3])])
    engine.step()
    engine.cancel(0)
    assert engine.num_free == 1
    engine.admit([DecodeJob(3, prompts[3])])
    engine.cancel("nobody")
    found = {}
    while engine.active:
        engine.step()
        found |= {work.key: decoded.rows_RS for work, decoded in engine.collect()}
    assert sorted(found) == [1, 2, 3]
    for number, rows in found.items():
        np.testing.assert_array_equal(rows, wanted[number])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_the_formula(scale):
    """Greedy tokens under guidance against two packed forwards, one with the condition and one without."""
    layout, rng = make_layout("codec"), np.random.default_rng(4)
    model = make_model(layout, tasks=("plain_tts",))
    text = random_content(layout, "text_bpe", 7, rng)
    settings = SamplingSettings(greedy=True, guidance=scale)
    prompt = make_prompt(layout, "plain_tts", [text], settings=settings, max_new=6)
    bare = np.concatenate([prompt.frames_PS[:2], prompt.frames_PS[-1:]])
    object.__setattr__(prompt, "unconditional_PS", bare)
    other = make_prompt(layout, "plain_tts", [text], settings=SamplingSettings(seed=5), name="other")
    guided, _ = decode(model, [prompt, other])
    P = len(prompt.frames_PS)

    def logits_of(first_rows):
        rows = torch.from_numpy(np.concatenate([first_rows, guided.rows_RS[P:]]))
        bounds = torch.tensor([0, len(rows)], dtype=torch.int32)
        with torch.no_grad():
            hidden = model.hidden(rows, torch.arange(len(rows)), bounds)[len(first_rows) - 1 :]
            vectors = model.head.stream_vectors()
            return [(hidden + vectors[s]) @ model.head.weight.T for s in range(layout.num_streams)]

    conditional, unconditional = logits_of(guided.rows_RS[:P]), logits_of(bare)
    for s, (start, end) in enumerate(layout.content_ranges("codec")):
        z = unconditional[s] + scale * (conditional[s] - unconditional[s])
        for frame in range(len(guided.content_TS)):
            row = z[frame + layout.delays[s]].clone()
            ids = list(range(start, end)) + ([layout.sos_eos_id] if s == 0 and frame >= 1 else [])
            best = ids[int(row[ids].argmax())]
            assert guided.content_TS[frame, s] == best
            if s:
                want = float(row[start:end].log_softmax(0).max())
                assert guided.logprob_TS[frame, s] == pytest.approx(want, abs=1e-3)
    engine = Engine(model, 1)
    with pytest.raises(GenerationError, match="2 slots are needed and 1 are free"):
        engine.admit([DecodeJob(0, prompt)])
    with pytest.raises(GenerationError, match="guidance needs two rows"):
        list(engine.run([DecodeJob(0, prompt)]))


@pytest.mark.parametrize("kind", ["codec_ssl", "codec", "ssl"])
def test_teacher_forcing_gives_the_log_probabilities_of_the_packed_form(kind):
    layout, rng = make_layout(kind), np.random.default_rng(5)
    task = {"codec_ssl": "codec_ssl_plain_tts", "codec": "plain_tts", "ssl": "ssl_tts"}[kind]
    model = make_model(layout, tasks=(task,))
    modality = make_prompt(layout, task, [random_content(layout, "text_bpe", 1, rng)]).modality
    prompts, contents = [], []
    for frames in (1, 4, 9):
        text = random_content(layout, "text_bpe", frames + 2, rng)
        prompts.append(make_prompt(layout, task, [text], settings=SamplingSettings(min_len=0)))
        contents.append(random_content(layout, modality, frames, rng))
    for prompt, content, one in zip(prompts, contents, decode(model, prompts, contents), strict=True):
        assert one.num_scored == 0 and one.finished == "eos"
        np.testing.assert_array_equal(one.content_TS, content)
        end = np.full((1, layout.num_streams), layout.pad_id)
        end[0, 0] = layout.sos_eos_id
        frames = torch.from_numpy(np.concatenate([prompt.frames_PS, content, end]))
        pads = [layout.pad_id] * layout.num_streams
        batch = delay_pack([frames], delays=layout.delays, pad_ids=pads)
        bounds = torch.tensor([0, len(batch.ids)], dtype=torch.int32)
        with torch.no_grad():
            hidden = model.hidden(batch.ids, torch.arange(len(batch.ids)), bounds)
        vectors = model.head.stream_vectors()
        P = len(prompt.frames_PS)
        for s, ids in enumerate(layout.content_ranges(modality)):
            if ids is None:
                continue
            columns = ([layout.sos_eos_id] if s == 0 else []) + list(range(*ids))
            h = hidden if vectors is None else hidden + vectors[s]
            log_p = (h @ model.head.weight[columns].T).detach().log_softmax(1)
            said = [*content[:, s], *([layout.sos_eos_id] if s == 0 else [])]
            want = [float(log_p[P + t - 1 + layout.delays[s], columns.index(i)]) for t, i in enumerate(said)]
            found = [*one.logprob_TS[:, s], *([one.end_logprob] if s == 0 else [])]
            np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("num_slots", [3, 8])
def test_steps_of_fixed_sizes_give_the_same(num_slots):
    """The sizes of graphs, slots padded to a power of two and keys to a multiple, with requests that come and go."""
    layout, rng = make_layout(), np.random.default_rng(6)
    model, prompts = make_model(layout, tasks=TASKS), prompts_of(layout, 11, rng)
    engine = Engine(model, num_slots, poll_interval=2, cuda_graphs=True)
    found = {
        work.key: decoded for work, decoded in engine.run(DecodeJob(n, p) for n, p in enumerate(prompts))
    }
    for number, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[number].rows_RS, decode(model, [prompt])[0].rows_RS)


def test_steps_of_fixed_sizes_for_a_long_time():
    """A slot that pads steps stays empty for as long as no request comes."""
    layout, rng = make_layout(), np.random.default_rng(8)
    model = make_model(layout, tasks=TASKS, positions=1024)

    def work(number, length):
        text = random_content(layout, "text_bpe", 3, rng)
        settings = SamplingSettings(greedy=False, top_k=5, seed=number, min_len=length, max_len=length)
        return DecodeJob(number, make_prompt(layout, TASKS[0], [text], settings=settings, name=f"r{number}"))

    engine, number = Engine(model, 4, cuda_graphs=True), 0
    for _ in range(2 * max(engine._cache.num_rows, 64)):
        while len(engine.active) < 3:
            engine.admit([work(number, 20 + number % 3)])
            number += 1
        engine.step()
        engine.collect()
        assert engine._cache.held[3] == int(engine._cache.lengths[3]) == 0
    engine.cancel(engine.active[-1].job.key)
    long = work(number, 2 * engine._cache.num_rows)
    engine.admit([long])
    (found,) = [decoded for done, decoded in engine.run([]) if done is long]
    np.testing.assert_array_equal(found.rows_RS, decode(model, [long.prompt])[0].rows_RS)


def test_logits_stay_where_captured_steps_write_them():
    layout, rng = make_layout(), np.random.default_rng(9)
    model, places = make_model(layout, tasks=TASKS), set()
    engine = Engine(model, 4, cuda_graphs=True)
    for number in range(4):
        prompt = make_prompt(layout, TASKS[0], [random_content(layout, "text_bpe", 3, rng)])
        engine.admit([DecodeJob(number, prompt)])
        engine.step()
        places.add(engine._head._logits.data_ptr())
    assert len(places) == 1


@pytest.mark.cuda
def test_captured_steps_give_what_eager_ones_do():
    layout, rng = make_layout(), np.random.default_rng(7)
    model = make_model(layout, tasks=TASKS).to("cuda")
    prompts = prompts_of(layout, 11, rng)
    eager = dict(
        (w.key, d.rows_RS)
        for w, d in Engine(model, 4, cuda_graphs=False).run(DecodeJob(n, p) for n, p in enumerate(prompts))
    )
    engine = Engine(model, 4, cuda_graphs=True)
    for work, decoded in engine.run(DecodeJob(n, p) for n, p in enumerate(prompts)):
        np.testing.assert_array_equal(decoded.rows_RS, eager[work.key])
    assert engine._graphs._graphs
