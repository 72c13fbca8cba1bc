"""Streams: the tokens, samples and text of ``generate`` to the bit, as early as the delays allow, and clean ends."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from python_tests.generation.conftest import TASKS, make_model, make_wave
from python_tests.generation.test_generate import CHAIN
from speechlm_ext.audio.files import write_wav
from speechlm_ext.audio.wav_stream import RawStream, WavStream, pcm16
from speechlm_ext.errors import AudioError, ConfigError, GenerationError, SpeechLMError, StorageError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, StreamChunk, generate
from speechlm_ext.generation.commands.generate import GenerateConfig, run_generate
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.live import stream as stream_room
from speechlm_ext.generation.live.stream import TextDecoder
from speechlm_ext.tokenizers import HuggingFaceText, SentencePieceText, TextConfig, TokenizerSet

DELAYS = [None, (0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 3, 2), (2, 3, 2, 4)]
SETTINGS = [
    SamplingSettings(greedy=True, max_len=7),
    SamplingSettings(seed=11, temperature=1.3, top_k=4, min_len=3, max_len=9),
    SamplingSettings(seed=2, top_p=0.9, repetition_penalty=1.2, guidance=1.5, max_len=9),
]
TTS = {"task": "codec_ssl_plain_tts", "text": "one two"}


def check(chunks: list[StreamChunk], result, num_columns: int, chunk_frames: int = 1) -> None:
    """Joined, the chunks are the result."""
    assert result.error is None
    ids = np.concatenate([c.ids for c in chunks])
    assert ids.dtype == np.int32 and ids.shape[1] == num_columns
    np.testing.assert_array_equal(ids, result.ids)
    assert [c.first_frame for c in chunks] == [
        0,
        *itertools.accumulate(len(c.ids) for c in chunks[:-1]),
    ]
    assert [c.is_last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(len(c.ids) >= chunk_frames for c in chunks[:-1])
    last = chunks[-1]
    assert (last.finished, last.logprob, last.num_scored) == (
        result.finished,
        result.logprob,
        result.num_scored,
    )
    assert all(c.finished is None and c.logprob is None for c in chunks[:-1])
    if result.wav is None:
        assert all(c.audio is None and c.sample_rate is None for c in chunks)
    else:
        np.testing.assert_array_equal(np.concatenate([c.audio for c in chunks]), result.wav)
        assert all(c.sample_rate == result.sample_rate and c.audio.dtype == np.float32 for c in chunks)
    assert (result.text is None) == all(c.text is None for c in chunks)
    if result.text is not None:
        assert "".join(c.text for c in chunks) == result.text


def requests(settings: SamplingSettings) -> list[GenerationRequest]:
    """Every kind of target, with a given beginning and without, with a voice and without."""
    fields: list[dict] = [
        {"task": "codec_ssl_plain_tts", "text": "one two"},
        {"task": "codec_ssl_tts", "text": "three", "speaker_prompt": make_wave(0.3, 1)},
        {"task": "asr", "audio": make_wave(0.2, 2)},
        {"task": "textlm", "text": "four fi"},
        {"task": "codec_ssl_audiolm", "audio": make_wave(0.2, 3)},
        {"task": "codec_ssl_audiolm"},
        {"task": "ssl_audiolm", "audio": make_wave(0.1, 4)},
    ]
    # Guidance needs conditions to leave out.
    plain, conditioned = (
        dataclasses.replace(settings, guidance=1.0),
        ("asr", "codec_ssl_tts", "codec_ssl_plain_tts"),
    )
    return [
        GenerationRequest(f["task"], settings=settings if f["task"] in conditioned else plain, **f)
        for f in fields
    ]


def check_streams(model, settings: SamplingSettings) -> None:
    """Streams of every kind of target equal the results of ``generate``."""
    for request in requests(settings):
        result = generate(model, [request], batch_size=1)[0]
        columns = 4 if result.modality == "codec_ssl" else 1
        for chunk_frames in (1, 4):
            check(list(model.stream(request, chunk_frames=chunk_frames)), result, columns, chunk_frames)


@pytest.mark.parametrize("delays", DELAYS, ids=str)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_a_stream_is_generate_bit_for_bit(tokenizers, delays, number):
    model = make_model(tokenizers.make_layout("t", delays=delays), tokenizers, seed=number, num_layers=1)
    check_streams(model, SETTINGS[number])


@pytest.mark.parametrize("delays", DELAYS, ids=str)
@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_chunks_come_as_soon_as_their_rows_are_there(tokenizers, delays, chunk_frames, monkeypatch):
    layout = tokenizers.make_layout("t", delays=delays)
    model, steps = make_model(layout, tokenizers, num_layers=1), []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, **_: (steps.append(1), step(self))[1])
    needed = []
    for chunk in model.stream(**TTS, max_len=10, min_len=10, seed=1, chunk_frames=chunk_frames):
        needed.append((chunk.first_frame + len(chunk.ids), len(steps)))
    for frames, rows in needed[:-1]:
        # Frame u of the slowest stream is chosen in row u + max_delay; rows before the least delay are the prompt's.
        assert rows == frames + layout.max_delay - min(layout.delays)
    assert needed[0][0] == chunk_frames and needed[-1][0] == 10


class Rarely(Engine):
    """An engine that looks as seldom as on a GPU."""

    def __init__(self, model, num_slots):
        super().__init__(model, num_slots, poll_interval=8)


def test_fewer_looks_at_a_gpu(model, monkeypatch):
    """Steps that are needed in any case are taken without a look between them; the tokens do not change."""
    looks = []
    look = stream_room._poll
    monkeypatch.setattr(stream_room, "_poll", lambda *a: (looks.append(1), look(*a))[1])
    monkeypatch.setattr(stream_room, "Engine", Rarely)
    request = GenerationRequest("a", **TTS, settings=SamplingSettings(seed=4, max_len=20, min_len=20))
    chunks = list(model.stream(request, chunk_frames=8))
    assert len(looks) <= 6
    check(chunks, generate(model, [request], batch_size=1)[0], 4, 8)


@pytest.mark.parametrize("delays", [None, (2, 0, 3, 2)], ids=str)
def test_of_several_targets_the_last_is_streamed(tokenizers, delays):
    chained = make_model(tokenizers.make_layout("t", delays=delays), tokenizers)
    object.__setattr__(chained.config, "tasks", (CHAIN,))
    for seed in range(4):
        settings = SamplingSettings(max_len=9, seed=seed)
        request = GenerationRequest("a", "chain", text="one", settings=settings)
        check(list(chained.stream(request)), generate(chained, [request], batch_size=1)[0], 4)


def test_keywords_and_requests(model):
    request = GenerationRequest("stream", **TTS, settings=SamplingSettings(seed=3, max_len=5))
    by_request = list(model.stream(request))
    for fields in ({"seed": 3, "max_len": 5}, {"settings": SamplingSettings(seed=3, max_len=5)}):
        found = list(model.stream(**TTS, **fields))
        np.testing.assert_array_equal(
            np.concatenate([c.ids for c in found]), np.concatenate([c.ids for c in by_request])
        )
    for arguments, message in (
        ({**TTS, "speed": 2}, r"unknown keys \['speed'\]"),
        ({"text": "x"}, "task missing"),
        ({**TTS, "top_k": 0}, "top_k must be an integer of at least 1"),
        ({**TTS, "chunk_frames": 0}, "chunk_frames must be an integer of at least 1, got 0"),
        ({**TTS, "best_of": 2}, "best_of selects among whole results"),
        ({"task": "asr", "audio": make_wave(), "beam_size": 2}, "beam_size selects among whole results"),
        ({"request": request, "text": "x"}, "a request or its fields"),
    ):
        with pytest.raises(GenerationError, match=message):
            model.stream(**arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "translate", "text": "x"},
        {"task": "codec_ssl_plain_tts"},
        {"task": "asr", "audio": "none.wav"},
        {"task": "asr", "audio": make_wave(), "audio_rate": 8000, "resample": False},
        {"task": "asr", "audio": make_wave(9.0)},
        {"task": "codec_ssl_tts", "text": "x"},
    ],
    ids=lambda f: f["task"],
)
def test_bad_requests_raise_what_generate_tells(model, fields):
    told = generate(model, [GenerationRequest("stream", **fields)])[0].error
    with pytest.raises(GenerationError) as raised:
        model.stream(**fields)
    assert str(raised.value) == told
    with pytest.raises(GenerationError, match="no tokenizers"):
        make_model(model.layout).stream(**TTS)


# ---- ends --------------------------------------------------------------------------------------------------
@pytest.fixture
def engines(monkeypatch):
    made = []

    class Watched(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(stream_room, "Engine", Watched)
    return made


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_stopping_early_frees_the_row(model, engines, guidance):
    long = {**TTS, "min_len": 12, "max_len": 12, "guidance": guidance}
    model.train()
    try:
        chunks = model.stream(**long)
        assert not engines and model.training  # nothing happens before the first chunk is asked for
        next(chunks)
        assert engines[0].num_free == 0 and not model.training
        chunks.close()
        assert engines[0].num_free == (1 if guidance == 1 else 2) and model.training
        with pytest.raises(StopIteration):
            next(chunks)

        for chunk in model.stream(**long):
            if chunk.first_frame == 2:
                break
        gc.collect()
        assert engines[1].num_free == engines[1].num_slots and model.training

        with pytest.raises(KeyError):
            for _ in model.stream(**long):
                raise KeyError
        gc.collect()
        assert engines[2].num_free == engines[2].num_slots

        chunks = model.stream(**long)
        with pytest.raises(KeyError):
            next(chunks)
            chunks.throw(KeyError())
        assert engines[3].num_free == engines[3].num_slots and model.training
        list(model.stream(**long))
        assert engines[4].num_free == engines[4].num_slots
        model.stream(**long).close()
        assert len(engines) == 5
    finally:
        model.eval()


@pytest.mark.parametrize("at, chunk_frames", [(0, 1), (2, 1), (7, 1), (7, 4)])
def test_nan_on_the_way_raises_behind_what_was_said(tokenizers, engines, at, chunk_frames):
    model = make_model(tokenizers.make_layout("t"), tokenizers)
    asked = {**TTS, "min_len": 12, "max_len": 12, "seed": 5}
    sound = list(model.stream(**asked))
    whole = np.concatenate([c.ids for c in sound])
    step, calls = model.step_hidden, itertools.count()
    model.step_hidden = lambda *a: step(*a) * (float("nan") if next(calls) >= at else 1.0)
    said: list[StreamChunk] = []
    with pytest.raises(GenerationError, match="request 'stream': the model's logits are not finite in row"):
        said.extend(model.stream(**asked, chunk_frames=chunk_frames))
    # extend() keeps what came before the error.
    frames = max(at - model.layout.max_delay, 0)
    ids = np.concatenate([c.ids for c in said])
    np.testing.assert_array_equal(ids, whole[:frames])
    audio = np.concatenate([c.audio for c in said])
    np.testing.assert_array_equal(audio, tokenizers.decode_codec(ids[:, 1:]))
    assert not any(c.is_last for c in said) and engines[-1].num_free == 1


# ---- text --------------------------------------------------------------------------------------------------
def byte_level() -> HuggingFaceText:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return HuggingFaceText(tokenizer.to_str())


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("text", ["one two", " é 漢字, ", "a🙂\ufffdb\ufffd", "", "\n\t x  "])
def test_pieces_hold_whole_characters_only(kind, text):
    tokenizer = byte_level() if kind == "huggingface" else SentencePieceText.fit(["one two"], TextConfig(270))
    ids = tokenizer.encode(text)
    pieces = TextDecoder(tokenizer)
    said = [pieces.push(ids[i : i + 1])["text"] for i in range(len(ids))]
    said.append(pieces.push(ids[:0], end=True)["text"])
    assert "".join(said) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said) and said[-1] == ""
    # A character cut off at the end is said as the whole text says it.
    cut = TextDecoder(tokenizer)
    odd = tokenizer.encode("x漢")[:-1]
    assert cut.push(odd)["text"] == "x"
    assert "x" + cut.push(odd[:0], end=True)["text"] == tokenizer.decode(odd)


def test_text_that_is_taken_back_is_an_error():
    class Fickle:
        kind = "fickle"

        def decode(self, ids):
            return "do not" if len(ids) == 2 else "don't"

    pieces = TextDecoder(Fickle())
    ids = np.zeros((1, 1), np.int32)
    assert pieces.push(ids)["text"] == "don't" and pieces.push(ids)["text"] == ""
    assert pieces.push(ids)["text"] == ""
    pieces = TextDecoder(Fickle())
    pieces.push(ids)
    with pytest.raises(GenerationError, match="changes emitted text"):
        pieces.push(ids, end=True)


def test_a_codec_that_cannot_stream_is_told_before_the_first_chunk(model):
    class Plain:
        kind, modality, sample_rate = "plain", "codec", 16000

    plain = make_model(
        model.layout, TokenizerSet(model.tokenizers.text, model.tokenizers.ssl, Plain()), TASKS
    )
    with pytest.raises(SpeechLMError, match="codec 'plain' cannot be decoded while its codes arrive"):
        plain.stream(**TTS)


# ---- files and the command line ----------------------------------------------------------------------------
def test_a_growing_wav_is_valid_at_every_moment(tmp_path):
    import soundfile  # here: GPU machines without it import tests of this file

    wave = np.concatenate([make_wave(0.1), [1.0, -1.0, 2.0, -2.0, 1e-9, -1e-9, 0.0]]).astype(np.float32)
    write_wav(tmp_path / "whole.wav", wave, 16000)
    path = tmp_path / "new" / "grows.wav"
    with WavStream(path, 16000) as sink:
        for start in range(0, len(wave), 399):
            found, rate = soundfile.read(path, dtype="int16")
            assert rate == 16000
            np.testing.assert_array_equal(found, np.frombuffer(pcm16(wave[:start]), "<i2"))
            sink.write(wave[start : start + 399])
    assert path.read_bytes() == (tmp_path / "whole.wav").read_bytes()
    buffer = io.BytesIO()
    raw = RawStream(buffer)
    raw.write(wave[:9])
    raw.write(wave[9:])
    assert buffer.getvalue() == path.read_bytes()[44:] and raw.num_samples == len(wave)
    with pytest.raises(StorageError, match="could not write"):
        WavStream(path / "file.wav", 16000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_no_sound(value, tmp_path):
    """What came before them stays a valid file."""
    import soundfile  # here: GPU machines without it import tests of this file

    good, bad = np.linspace(-0.5, 0.5, 7, dtype=np.float32), np.array([0.0, value], np.float32)
    with WavStream(tmp_path / "a.wav", 16000) as sink:
        sink.write(good)
        with pytest.raises(AudioError, match=f"sample 1 of 2 is {value}, not a finite number"):
            sink.write(bad)
    assert soundfile.info(tmp_path / "a.wav").frames == 7
    buffer = io.BytesIO()
    with pytest.raises(AudioError, match="sample 1 of 2"):
        RawStream(buffer).write(bad)
    assert buffer.getvalue() == b""


def test_the_command_writes_while_it_is_made(model_folder, tmp_path, capfd, monkeypatch):
    import soundfile  # here: GPU machines without it import tests of this file

    settings = {"text": "one two", "max_len": 12, "min_len": 12, "seed": 3}
    task, whole, grown = "codec_ssl_plain_tts", tmp_path / "whole.wav", tmp_path / "grown.wav"
    assert run_generate(GenerateConfig(model_folder, task, **settings, output=whole)) == 0
    lengths = []
    write = WavStream.write
    monkeypatch.setattr(
        WavStream, "write", lambda self, w: (write(self, w), lengths.append(soundfile.info(grown).frames))
    )
    capfd.readouterr()
    assert run_generate(GenerateConfig(model_folder, task, **settings, output=grown, stream=True)) == 0
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.index("first audio after") < captured.err.index("wrote")
    assert grown.read_bytes() == whole.read_bytes() and len(lengths) == 5 and lengths == sorted(lengths)

    class Out:
        buffer = io.BytesIO()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Out)
        cfg = GenerateConfig(model_folder, task, **settings, output=Path("-"), stream=True, chunk_frames=5)
        assert run_generate(cfg) == 0
    assert Out.buffer.getvalue() == whole.read_bytes()[44:]


def test_the_command_prints_text_as_it_comes(model_folder, tmp_path, capsys):
    for task, given in (("textlm", {"text": "four fi"}), ("ssl_audiolm", {})):
        settings = {**given, "max_len": 6, "min_len": 4, "seed": 1, "greedy": False}
        assert run_generate(GenerateConfig(model_folder, task, **settings)) == 0
        whole = capsys.readouterr().out
        out = tmp_path / f"{task}.txt"
        assert run_generate(GenerateConfig(model_folder, task, **settings, output=out, stream=True)) == 0
        assert capsys.readouterr().out == whole == out.read_text("utf-8")
    with pytest.raises(ConfigError, match="stream is for one request"):
        GenerateConfig(tmp_path, requests=tmp_path / "r.jsonl", output_dir=tmp_path, stream=True)
    with pytest.raises(ConfigError, match="goes with stream"):
        GenerateConfig(tmp_path, "asr", output=Path("-"))
    with pytest.raises(ConfigError, match="-o out.wav"):
        run_generate(GenerateConfig(model_folder, "codec_ssl_plain_tts", text="one", stream=True))


def test_streams_may_be_interleaved(model):
    """Two streams on one model: each has an engine of its own."""
    one, two = ({**TTS, "seed": seed, "min_len": 8, "max_len": 8} for seed in (1, 2))
    alone = [np.concatenate([c.ids for c in model.stream(**f)]) for f in (one, two)]
    pairs = list(zip(model.stream(**one), model.stream(**two), strict=True))
    for number in (0, 1):
        np.testing.assert_array_equal(np.concatenate([p[number].ids for p in pairs]), alone[number])
    assert not torch.is_grad_enabled() or not model.training
