"""Multi-scale models: the engine's tokens are those of a full recompute, whatever the request and its company."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import FRAME, make_model, make_wave
from python_tests.generation.engine.recorded_graphs import captures, make_engine
from python_tests.generation.engine.test_slots import TASKS, prompts_of
from python_tests.generation.live import test_stream
from python_tests.generation.live.test_chat import talk
from python_tests.generation.live.test_stream import SETTINGS, TTS
from python_tests.generation.test_generate import CHAIN
from python_tests.generation.tools import decode, make_layout, make_prompt, random_content
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.live import stream as stream_room
from speechlm_ext.generation.live.chat import Chat
from speechlm_ext.generation.search.beam import beam_search
from speechlm_ext.ops import delay_pack

GREEDY = SamplingSettings(greedy=True)


def build(kind="codec_ssl", tokenizers=None, **changes):
    """A layout without delays and a random multi-scale model."""
    if tokenizers is not None:
        layout = tokenizers.make_layout("t", delays=[0] * 4)
    else:
        layout = make_layout(kind, (0,) * {"codec_ssl": 4, "codec": 3}[kind])
    return layout, make_model(layout, tokenizers, frame=FRAME, **changes)


@pytest.fixture(scope="module")
def speaking(tokenizers):
    return build(tokenizers=tokenizers, positions=1024)[1]


def engine_of(model, prompts, **options):
    engine = Engine(model, **options)
    found = {
        work.key: decoded for work, decoded in engine.run(DecodeJob(n, p) for n, p in enumerate(prompts))
    }
    return [found[n] for n in range(len(prompts))]


@torch.no_grad()
def recompute(model, prompt, scale=1.0):
    """Greedy decoding without a cache: the whole sequence and the whole frame anew for each token."""
    layout, S = model.layout, model.layout.num_streams
    ranges, segment = layout.content_ranges(prompt.modality), prompt.segments[0]
    beginnings = [torch.from_numpy(prompt.frames_PS)]
    if scale != 1:
        beginnings.append(torch.from_numpy(prompt.unconditional_PS))
    said, logprobs = [], []
    while True:
        hidden = []
        for rows in beginnings:
            rows = torch.cat([rows, *(f[None] for f in said)])
            bounds = torch.tensor([0, len(rows)], dtype=torch.int32)
            hidden.append(model.hidden(rows, torch.arange(len(rows)), bounds)[-1])
        frame, scores = torch.full((S,), layout.pad_id), []
        for s in range(S):
            if ranges[s] is None:
                continue
            ids = list(range(*ranges[s]))
            if s == 0 and len(said) >= segment.min_new:
                ids = sorted([layout.sos_eos_id, *ids])
            z = []
            for h in hidden:
                if s > 0:
                    h = model.frame(h[None], model.embedding(frame[None, :-1, None]))[0, s - 1]
                    h = h + model.head.stream_embed[s - 1]
                z.append(h @ model.head.weight[ids].T)
            logits = z[0] if scale == 1 else z[1] + scale * (z[0] - z[1])
            frame[s] = ids[int(logits.argmax())]
            scores.append(float(logits.log_softmax(0).max()))
            if frame[0] == layout.sos_eos_id:
                return torch.stack(said).numpy(), np.array(logprobs), scores[0]
        said.append(frame)
        logprobs.append(scores)
        if len(said) == segment.max_new:
            return torch.stack(said).numpy(), np.array(logprobs), None


@pytest.mark.parametrize("kind", ["codec_ssl", "codec"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_greedy_tokens_are_those_of_a_full_recompute(kind, scale):
    layout, model = build(kind)
    rng, prompts = np.random.default_rng(0), []
    task = {"codec_ssl": "codec_ssl_plain_tts", "codec": "plain_tts"}[kind]
    for number in range(5):
        settings = SamplingSettings(greedy=True, guidance=scale, min_len=3)
        text = random_content(layout, "text_bpe", 2 + number, rng)
        prompts.append(make_prompt(layout, task, [text], settings=settings, max_new=4 + number))
        bare = np.concatenate([prompts[-1].frames_PS[:2], prompts[-1].frames_PS[-1:]])
        object.__setattr__(prompts[-1], "unconditional_PS", None if scale == 1 else bare)
    prompts.append(make_prompt(layout, "textlm", [], settings=GREEDY))
    for prompt, one in zip(prompts, decode(model, prompts), strict=True):
        frames, scores, _ = recompute(model, prompt, scale if prompt.unconditional_PS is not None else 1.0)
        np.testing.assert_array_equal(one.content_TS, frames)
        np.testing.assert_allclose(one.logprob_TS[:, : scores.shape[1]], scores, atol=1e-4)
        assert prompt.modality == "text_bpe" or len(one.content_TS) >= 3


@pytest.mark.parametrize(
    "options", [{}, {"cuda_graphs": True, "poll_interval": 2}, {"poll_interval": 3}], ids=str
)
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_whatever_the_company(num_slots, options):
    """Ragged text and speech that come and go, in fixed sizes too: each as if it were alone."""
    layout, model = build(tasks=TASKS)
    prompts = prompts_of(layout, 11, np.random.default_rng(6))
    found = engine_of(model, prompts, num_slots=num_slots, **options)
    for prompt, one in zip(prompts, found, strict=True):
        alone = decode(model, [prompt])[0]
        np.testing.assert_array_equal(one.rows_RS, alone.rows_RS)
        np.testing.assert_allclose(one.logprob_TS, alone.logprob_TS, atol=1e-4)
        assert (one.finished, one.num_scored) == (alone.finished, alone.num_scored)


@pytest.mark.parametrize("kind", ["codec_ssl", "codec"])
def test_teacher_forcing_gives_the_models_own_log_probabilities(kind):
    layout, model = build(kind)
    rng = np.random.default_rng(5)
    task = {"codec_ssl": "codec_ssl_plain_tts", "codec": "plain_tts"}[kind]
    prompts, contents = [], []
    for frames in (1, 4, 9):
        text = random_content(layout, "text_bpe", frames + 2, rng)
        prompts.append(make_prompt(layout, task, [text], settings=SamplingSettings(min_len=0)))
        contents.append(random_content(layout, prompts[-1].modality, frames, rng))
    for prompt, content, one in zip(prompts, contents, decode(model, prompts, contents), strict=True):
        assert one.num_scored == 0 and one.finished == "eos"
        np.testing.assert_array_equal(one.content_TS, content)
        end = np.full((1, layout.num_streams), layout.pad_id)
        end[0, 0] = layout.sos_eos_id
        P, T = len(prompt.frames_PS), len(content)
        frames = torch.from_numpy(np.concatenate([prompt.frames_PS, content, end]))
        batch = delay_pack([frames], delays=layout.delays, pad_ids=[layout.pad_id] * layout.num_streams)
        mask = torch.zeros(batch.labels.shape, dtype=torch.bool)
        mask[P - 1 : P - 1 + T, 1:] = True
        found, _ = model.logprobs(batch.ids, batch.labels, mask, batch.position, batch.cu_seqlens)
        np.testing.assert_allclose(one.logprob_TS[:, 1:], found[P - 1 : P - 1 + T, 1:], atol=1e-4)
        # The first stream's softmax runs over what the target may say, in training over more.
        with torch.no_grad():
            hidden = model.hidden(batch.ids, batch.position, batch.cu_seqlens)[P - 1 : P + T]
            columns = [layout.sos_eos_id, *range(*layout.content_ranges(prompt.modality)[0])]
            log_p = (hidden @ model.head.weight[columns].T).log_softmax(1)
        said = [columns.index(i) for i in [*content[:, 0], layout.sos_eos_id]]
        wanted = log_p[torch.arange(T + 1), said]
        np.testing.assert_allclose([*one.logprob_TS[:, 0], one.end_logprob], wanted, atol=1e-4)


def test_only_streams_that_are_said_are_computed(monkeypatch):
    layout, model = build(tasks=TASKS)
    streams, stream_hidden = [], model.stream_hidden
    monkeypatch.setattr(
        model, "stream_hidden", lambda h, t, s, c: (streams.append(s), stream_hidden(h, t, s, c))[1]
    )
    rng = np.random.default_rng(7)
    speech = [random_content(layout, "codec_ssl", 4, rng)]
    decode(model, [make_prompt(layout, "codec_ssl_asr", speech), make_prompt(layout, "ssl_audiolm", [])])
    assert streams == []
    prompt = make_prompt(layout, "codec_ssl_plain_tts", [random_content(layout, "text_bpe", 4, rng)])
    steps = len(decode(model, [prompt])[0].rows_RS) - len(prompt.frames_PS)
    assert streams == [1, 2, 3] * steps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", [1, 3])
def test_bad_logits_of_a_stream_fail_their_request_only(monkeypatch, value, stream):
    layout, model = build(tasks=TASKS)
    rng = np.random.default_rng(8)
    settings = SamplingSettings(seed=1, min_len=8)
    prompts = [
        make_prompt(
            layout, TASKS[0], [random_content(layout, "text_bpe", n, rng)], settings=settings, name=f"r{n}"
        )
        for n in (3, 5)
    ]
    wanted = decode(model, prompts)[1]
    calls, stream_hidden = itertools.count(), model.stream_hidden

    def spoilt(hidden, token, s, cache):
        out = stream_hidden(hidden, token, s, cache)
        if s == stream and next(calls) == 4 and len(out) > 1:
            out = out.clone()
            out[0] = value
        return out

    monkeypatch.setattr(model, "stream_hidden", spoilt)
    broken, fine = decode(model, prompts)
    assert broken.finished == "failed" and "'r3'" in broken.error and "not finite" in broken.error
    assert len(broken.rows_RS) == len(prompts[0].frames_PS) + 5
    np.testing.assert_array_equal(fine.rows_RS, wanted.rows_RS)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_a_stream_is_generate_bit_for_bit(tokenizers, number):
    _, model = build(tokenizers=tokenizers, seed=number)
    test_stream.check_streams(model, SETTINGS[number])


def test_the_first_chunk_comes_after_one_row_and_stopping_frees_it(speaking, monkeypatch):
    steps, engines, step = [], [], Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda self, **_: (steps.append(1), engines.append(self), step(self))[2]
    )
    chunks = speaking.stream(**TTS, min_len=9, max_len=9, seed=1)
    assert len(next(chunks).ids) == 1 and len(steps) == 1
    assert engines[0].num_free == 0
    chunks.close()
    assert engines[0].num_free == 1
    monkeypatch.setattr(stream_room, "Engine", test_stream.Rarely)
    request = GenerationRequest("a", **TTS, settings=SamplingSettings(seed=4, max_len=20, min_len=20))
    rare = list(speaking.stream(request, chunk_frames=8))
    test_stream.check(rare, generate(speaking, [request], batch_size=1)[0], 4, 8)


def test_dialogues_keep_their_cache(speaking):
    kept, fresh = Chat(speaking, "textlm"), Chat(speaking, "textlm")
    for mine, other in zip(talk(kept, False), talk(fresh, True), strict=True):
        np.testing.assert_array_equal(mine.ids, other.ids)
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
    np.testing.assert_array_equal(kept.frames_TS, fresh.frames_TS)


def test_listening(speaking):
    wave = np.concatenate([make_wave(0.5, 1), make_wave(0.5, 2)])
    settings = SamplingSettings(max_len=12)
    listener = speaking.listen("asr", chunk_seconds=0.5, settings=settings)
    for partial in listener.push(wave):
        so_far = wave[: int(partial.seconds * 16000)]
        (offline,) = speaking.generate([GenerationRequest("a", "asr", audio=so_far, settings=settings)])
        assert partial.text == offline.text
    np.testing.assert_array_equal(listener.finish().ids, offline.ids)


def test_best_of_is_the_best_of_its_tries(speaking):
    def ask(n, seed):
        settings = SamplingSettings(seed=seed, best_of=n, temperature=1.0, max_len=9)
        return GenerationRequest("a", "codec_ssl_plain_tts", text="one two", settings=settings)

    single = [generate(speaking, [ask(1, seed)])[0] for seed in range(5, 9)]
    assert len({r.ids.tobytes() for r in single}) == 4
    (best,) = generate(speaking, [ask(4, 5)])
    ended = [i for i, r in enumerate(single) if r.finished == "eos"] or range(4)
    np.testing.assert_array_equal(best.ids, single[max(ended, key=lambda i: best.tries[i])].ids)


def test_several_targets_and_beams(tokenizers):
    layout, model = build(tokenizers=tokenizers)
    tasks = model.config.tasks
    object.__setattr__(model.config, "tasks", (CHAIN,))
    for seed in range(3):
        settings = SamplingSettings(max_len=9, seed=seed)
        request = GenerationRequest("a", "chain", text="one", settings=settings)
        one, two = generate(model, [request, request])
        np.testing.assert_array_equal(one.ids, two.ids)
        test_stream.check(list(model.stream(request)), generate(model, [request], batch_size=1)[0], 4)
    object.__setattr__(model.config, "tasks", tasks)
    text = make_prompt(layout, "textlm", [], settings=GREEDY, max_new=5)
    (beam,), (greedy,) = beam_search(model, text, 1, 0.0), decode(model, [text])
    np.testing.assert_array_equal(beam.content_TS, greedy.content_TS)
    speech = make_prompt(layout, "codec_ssl_audiolm", [], settings=GREEDY)
    with pytest.raises(GenerationError, match="targets of one stream"):
        beam_search(model, speech, 2)


@pytest.mark.parametrize("live", [True, False])
def test_captured_steps_give_the_same(recorded, live):
    """Steps with a call for each stream: a request alone, captured before its first row, and a batch as it goes."""
    layout, model = build(tasks=TASKS)
    prompts = prompts_of(layout, 9, np.random.default_rng(8))
    engine = make_engine(model, 3)
    jobs = [DecodeJob(number, prompt) for number, prompt in enumerate(prompts)]
    found = {}
    if live:
        for job in jobs:
            engine.admit([job])
            before = captures(recorded)
            while engine.active:
                engine.step()
                found |= {done.key: decoded for done, decoded in engine.collect()}
            assert captures(recorded) == before
    else:
        found = {job.key: decoded for job, decoded in engine.run(jobs)}
    assert "replay" in recorded and captures(recorded)
    for number, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[number].rows_RS, decode(model, [prompt])[0].rows_RS)


@pytest.mark.cuda
def test_captured_steps_give_what_eager_ones_do():
    layout, model = build(tasks=TASKS)
    model, prompts = model.to("cuda"), prompts_of(layout, 11, np.random.default_rng(7))
    eager = engine_of(model, prompts, num_slots=4, cuda_graphs=False)
    for one, wanted in zip(engine_of(model, prompts, num_slots=4, cuda_graphs=True), eager, strict=True):
        np.testing.assert_array_equal(one.rows_RS, wanted.rows_RS)
