"""Requests on a tiny real model: training's form, cache, batches, decoding, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_tests.data.sequence_oracle import assemble
from python_tests.generation.conftest import make_model, make_wave
from python_tests.generation.tools import decode, make_layout, make_prompt, random_content
from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import AudioError, GenerationError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.requests.encode_fields import raw_content
from speechlm_ext.generation.requests.prompt import build_prompt
from speechlm_ext.ops import delay_pack
from speechlm_ext.tasks import Entry, TaskTemplate, builtin_tasks

SHORT = SamplingSettings(max_len=9)


def requests(settings: SamplingSettings = SHORT) -> list[GenerationRequest]:
    """One of every task, of different lengths."""
    return [
        GenerationRequest("tts", "codec_ssl_plain_tts", text="one two", settings=settings),
        GenerationRequest(
            "clone", "codec_ssl_tts", text="three", speaker_prompt=make_wave(0.3, 1), settings=settings
        ),
        GenerationRequest("asr", "asr", audio=make_wave(0.4, 2), settings=settings),
        GenerationRequest("text", "textlm", text="four fi", settings=settings),
        GenerationRequest("free text", "textlm", settings=settings),
        GenerationRequest("audio", "codec_ssl_audiolm", audio=make_wave(0.2, 3), settings=settings),
        GenerationRequest("units", "ssl_audiolm", audio=make_wave(0.3, 4), settings=settings),
    ]


def utterance(request: GenerationRequest, tokenizers) -> dict:
    """What the data room stores for a request's content."""
    columns = {"id": request.id}
    if request.text is not None:
        columns["text_bpe"] = tokenizers.text.encode(request.text)
    if request.audio is not None:
        columns["ssl"], columns["codec"] = (
            t.encode(request.audio) for t in (tokenizers.ssl, tokenizers.codec)
        )
    return columns


@pytest.mark.parametrize("delays", [None, (0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 3, 2)])
def test_rows_are_those_that_training_packs(tokenizers, delays):
    layout = tokenizers.make_layout("t", delays=delays)
    model = make_model(layout, tokenizers)
    for request in requests():
        kin = {"asr": "codec_ssl_asr"}
        template = builtin_tasks()[kin.get(request.task, request.task)]
        prompt = build_prompt(request, model)
        one = decode(model, [prompt])[0]
        content = raw_content(one.content_TS, prompt.modality, layout)
        stored = utterance(request, tokenizers)
        if prompt.modality == "codec_ssl":
            stored |= {"ssl": content[:, :1], "codec": content[:, 1:]}
        else:
            stored[prompt.modality] = content
        voice = None
        if request.speaker_prompt is not None:
            voice = tokenizers.encode_codec_ssl(request.speaker_prompt)
        frames_TS, _ = assemble(template, stored, layout, voice)
        pad_ids = [layout.pad_id] * layout.num_streams
        packed = delay_pack([torch.from_numpy(frames_TS)], delays=layout.delays, pad_ids=pad_ids, tail="trim")
        rows = packed.ids.numpy()
        last = len(one.rows_RS)
        if delays is not None and delays[0] and one.finished == "eos":
            rows, one_rows = rows[:, [0, 2, 3]], one.rows_RS[:, [0, 2, 3]]
        else:
            one_rows = one.rows_RS
        np.testing.assert_array_equal(one_rows, rows[:last], err_msg=request.id)
        assert (rows[last:] == layout.pad_id).all()


@pytest.mark.parametrize("kind", ["codec_ssl", "codec", "ssl"])
def test_logprob_equals_that_of_the_packed_forward(kind):
    """What was decoded with the cache has the probability that the training form gives it."""
    layout, rng = make_layout(kind), np.random.default_rng(0)
    task = {"codec_ssl": "codec_ssl_plain_tts", "codec": "plain_tts", "ssl": "ssl_tts"}[kind]
    model = make_model(layout, tasks=(task, "textlm"))
    settings = SamplingSettings(temperature=1.0, seed=4)
    prompts = [
        make_prompt(
            layout, task, [random_content(layout, "text_bpe", n, rng)], settings=settings, max_new=n + 3
        )
        for n in (2, 11, 5)
    ] + [make_prompt(layout, "textlm", [], settings=settings)]
    for prompt, one in zip(prompts, decode(model, prompts), strict=True):
        ids_NS = torch.from_numpy(one.rows_RS)
        N = len(ids_NS)
        with torch.no_grad():
            hidden_ND = model.hidden(ids_NS, torch.arange(N), torch.tensor([0, N], dtype=torch.int32))
        total, count = 0.0, 0
        for s, ids in enumerate(layout.content_ranges(prompt.modality)):
            if ids is None:
                continue
            eos = [(layout.sos_eos_id, layout.sos_eos_id + 1)] if s == 0 else []
            columns = torch.cat([torch.arange(a, b) for a, b in [*eos, ids]])
            vectors = model.head.stream_vectors()
            logits = (hidden_ND if vectors is None else hidden_ND + vectors[s]) @ model.head.weight[columns].T
            P = len(prompt.frames_PS)
            end = P + len(one.content_TS) + (s == 0 and one.finished == "eos")
            for frame in range(P, end):
                row = frame + layout.delays[s]
                row_logits = logits[row - 1].clone()
                if s == 0 and frame < P + prompt.segments[0].min_new:
                    row_logits[0] = float("-inf")
                column = (columns == ids_NS[row, s]).nonzero()[0, 0]
                total += float(row_logits.detach().log_softmax(0)[column])
                count += 1
        assert one.num_scored == count
        assert one.logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(greedy=True, max_len=12),
        SamplingSettings(temperature=1.3, top_k=4, seed=11, max_len=12),
        SamplingSettings(top_p=0.8, temperature=1.0, seed=2, max_len_ratio=1.5),
    ],
)
def test_batch_equals_alone(model, settings):
    asked = requests(settings)
    if settings.max_len_ratio:
        asked = [r for r in asked if r.id != "free text"]
    together = generate(model, asked)
    assert [r.id for r in together] == [r.id for r in asked]
    for request, one in zip(asked, together, strict=True):
        alone = generate(model, [request], batch_size=1)[0]
        np.testing.assert_array_equal(one.ids, alone.ids, err_msg=request.id)
        assert (one.finished, one.text, one.num_scored) == (alone.finished, alone.text, alone.num_scored)
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert one.error is None


def test_other_seed_gives_other_tokens_and_same_seed_the_same(model):
    ids_of: dict[int, list] = {}
    for seed in (1, 2, 1):
        settings = SamplingSettings(temperature=2.0, seed=seed, min_len=9, max_len=9)
        result = generate(model, [GenerationRequest("a", "codec_ssl_audiolm", settings=settings)])[0]
        assert len(result.ids) == 9
        ids_of.setdefault(seed, []).append(result.ids.tolist())
    assert ids_of[1][0] == ids_of[1][1] != ids_of[2][0]


def test_results_are_decoded(model, tokenizers):
    by_id = {r.id: r for r in generate(model, requests())}
    tts = by_id["tts"]
    assert tts.modality == "codec_ssl" and tts.ids.shape[1] == 4 and tts.sample_rate == 16000
    np.testing.assert_array_equal(tts.wav, tokenizers.decode_codec(tts.ids[:, 1:]))
    assert by_id["asr"].text == tokenizers.text.decode(by_id["asr"].ids)
    given = tokenizers.text.encode("four fi")
    np.testing.assert_array_equal(by_id["text"].ids[: by_id["text"].num_given], given)
    assert by_id["text"].text.startswith("four fi") and by_id["text"].num_given == len(given)
    audio = by_id["audio"]
    np.testing.assert_array_equal(
        audio.ids[: audio.num_given], tokenizers.encode_codec_ssl(make_wave(0.2, 3))
    )
    assert audio.num_given < len(audio.ids) <= audio.num_given + 9
    assert by_id["units"].wav is None and by_id["units"].ids.shape[1] == 1
    for result in by_id.values():
        assert result.finished in ("eos", "max_len") and result.logprob < 0
        assert result.settings.max_len == 9 and result.settings.greedy is not None


def test_one_bad_request_stops_no_other(model, tmp_path):
    bad = [
        (GenerationRequest("b0", "translate", text="x"), "not one that the model was trained for"),
        (GenerationRequest("b1", "codec_ssl_plain_tts"), "text is missing"),
        (GenerationRequest("b2", "codec_ssl_plain_tts", text="  "), "text is empty"),
        (GenerationRequest("b3", "asr", audio=tmp_path / "none.wav"), "does not exist"),
        (GenerationRequest("b4", "asr", audio=make_wave(), audio_rate=8000, resample=False), "8000 Hz"),
        (GenerationRequest("b5", "asr", audio=make_wave(9.0)), "context is 256"),
        (GenerationRequest("b6", "asr", audio=make_wave(), text="x"), "takes only audio"),
        (GenerationRequest("b7", "codec_ssl_tts", text="x"), "speaker_prompt is missing"),
        (GenerationRequest("b8", "asr", audio=np.full(4000, np.nan, np.float32)), "not a finite number"),
        (GenerationRequest("b9", "tts", text="x"), "names several trained tasks"),
        (
            GenerationRequest("b10", "textlm", text="one", settings=SamplingSettings(min_len=999)),
            "at least 999 more must fit",
        ),
        (
            GenerationRequest(
                "b11", "textlm", text="one", settings=SamplingSettings(min_len=50, max_len_ratio=1.0)
            ),
            "can never end",
        ),
        (
            GenerationRequest("b12", "textlm", text="one", settings=SamplingSettings(guidance=2.0)),
            "the task has none",
        ),
    ]
    good = requests()[3]
    results = generate(model, [r for r, _ in bad] + [good], batch_size=4)
    for (request, message), result in zip(bad, results, strict=False):
        assert result.finished == "failed" and result.id == request.id
        assert message in result.error and repr(request.id) in result.error, result.error
    assert results[-1].finished != "failed"
    np.testing.assert_array_equal(results[-1].ids, generate(model, [good])[0].ids)


def test_nan_weights_fail_with_a_message(model):
    broken = make_model(model.layout, model.tokenizers, seed=1)
    with torch.no_grad():
        start, end = model.layout.interval("ssl")
        broken.head.weight[start:end] = float("nan")
    results = {r.id: r for r in generate(broken, requests())}
    assert results["tts"].finished == "failed" and "not finite" in results["tts"].error
    assert results["asr"].finished in ("eos", "max_len")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, "from 0.001 to 1000, got 0.0; set greedy"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_k": 0}, "at least 1"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"min_len": -1}, "at least 0, got -1"),
        ({"min_len": 5, "max_len": 4}, "never end"),
        ({"max_len": 0}, "at least 1"),
        ({"max_len": 5, "max_len_ratio": 1.0}, "one of them"),
        ({"seed": -1}, "seed must be an integer from 0 to 9223372036854775807"),
        ({"top_k": 2.5}, "integer"),
    ],
)
def test_rejects_bad_settings(settings, message):
    with pytest.raises(GenerationError, match=message):
        SamplingSettings(**settings)


def test_another_rate_is_converted_and_said_unless_refused(model, tmp_path, caplog):
    write_wav(tmp_path / "a.wav", make_wave()[::2], 8000)
    refused, served = generate(
        model,
        [
            GenerationRequest("no", "asr", audio=tmp_path / "a.wav", settings=SHORT, resample=False),
            GenerationRequest("yes", "asr", audio=tmp_path / "a.wav", settings=SHORT),
        ],
    )
    assert "8000 Hz" in refused.error and "resample is false" in refused.error
    assert served.finished != "failed"
    said = "1 recording converted from 8000 Hz to 16000 Hz; above 4000 Hz there is nothing in them, unlike in others"
    assert [r.message for r in caplog.records] == [said]
    caplog.clear()
    chat = model.chat("codec_ssl_asr")
    chat.say(audio=tmp_path / "a.wav")
    assert [r.message for r in caplog.records] == [said]
    with pytest.raises(GenerationError, match="resample is false"):
        chat.say(audio=tmp_path / "a.wav", resample=False)


def test_longest_length_is_what_the_context_holds(tokenizers):
    layout = tokenizers.make_layout("t")
    model = make_model(layout, tokenizers, positions=64)
    request = GenerationRequest(
        "a", "codec_ssl_plain_tts", text="one", settings=SamplingSettings(seed=1, min_len=40)
    )
    result = generate(model, [request])[0]
    prompt = build_prompt(request, model)
    # The last row that is fed has position 63.
    assert len(prompt.frames_PS) + prompt.segments[0].max_new + layout.max_delay - 1 == 64
    assert result.finished != "failed" and len(result.ids) <= prompt.segments[0].max_new


CHAIN = TaskTemplate("textlm", 64, "chain", (), (Entry("text", "text_bpe"), Entry("audio", "codec_ssl")))


@pytest.mark.parametrize("delays", [None, (0, 0, 0, 0), (0, 1, 1, 1), (2, 0, 3, 2)])
def test_chain_of_targets(tokenizers, delays):
    """Two targets, the second after the first: row by row one training sequence, decoded in one go."""
    layout = tokenizers.make_layout("t", delays=delays)
    chained = make_model(layout, tokenizers)
    object.__setattr__(chained.config, "tasks", (CHAIN,))
    asked = [
        GenerationRequest(str(n), "chain", text="one", settings=SamplingSettings(max_len=9, seed=n))
        for n in range(3)
    ] + [GenerationRequest("free", "chain", settings=SamplingSettings(max_len=4, greedy=False, seed=9))]
    prompts = [build_prompt(r, chained) for r in asked]
    for request, result, one in zip(
        asked, generate(chained, asked, batch_size=3), decode(chained, prompts), strict=True
    ):
        assert result.modality == "codec_ssl" and len(result.chain) == 1, result.error
        columns = {"text_bpe": result.chain[0], "ssl": result.ids[:, :1], "codec": result.ids[:, 1:]}
        frames_TS, _ = assemble(CHAIN, columns, layout)
        rows = delay_pack(
            [torch.from_numpy(frames_TS)], delays=layout.delays, pad_ids=[0] * layout.num_streams, tail="trim"
        ).ids.numpy()
        # A stream ahead of stream 0 cannot know of an end that stream 0 has not chosen yet.
        behind = [s for s, d in enumerate(layout.delays) if d >= layout.delays[0]]
        np.testing.assert_array_equal(one.rows_RS[:, behind], rows[: len(one.rows_RS), behind], request.id)
        np.testing.assert_array_equal(raw_content(one.content_TS, "codec_ssl", layout), result.ids)
        assert one.logprob == pytest.approx(result.logprob, abs=1e-3)


def test_a_chain_leaves_room_for_every_target(tokenizers):
    layout = tokenizers.make_layout("t")
    chained = make_model(layout, tokenizers, positions=64)
    object.__setattr__(chained.config, "tasks", (CHAIN,))
    settings = SamplingSettings(min_len=8, seed=1)
    result = generate(chained, [GenerationRequest("a", "chain", text="one", settings=settings)])[0]
    assert result.error is None and len(result.chain[0]) >= 8 and len(result.ids) >= 8
    settings = SamplingSettings(min_len=30)
    result = generate(chained, [GenerationRequest("a", "chain", text="one", settings=settings)])[0]
    assert "at least 30 more must fit for each target" in result.error


def test_refuses_a_model_without_tokenizers(model):
    with pytest.raises(GenerationError, match="no tokenizers"):
        generate(make_model(model.layout), [])
    with pytest.raises(GenerationError, match="batch_size"):
        generate(model, [], batch_size=0)
    assert issubclass(AudioError, ValueError)
