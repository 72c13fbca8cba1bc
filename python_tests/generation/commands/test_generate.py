"""The generate command: one request, a file of requests, resuming, and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from python_tests.generation.conftest import make_wave
from speechlm_ext.audio.files import write_wav
from speechlm_ext.cli import main
from speechlm_ext.errors import ConfigError, GenerationError, StorageError
from speechlm_ext.generation import GenerationRequest, SamplingSettings, generate
from speechlm_ext.generation.commands.generate import EXAMPLES, GenerateConfig, run_generate
from speechlm_ext.generation.requests import results_folder as records


@pytest.fixture
def recording(tmp_path):
    write_wav(tmp_path / "in.wav", make_wave(0.3, 2), 16000)
    return tmp_path / "in.wav"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_text_to_speech(model_folder, model, tmp_path, capsys):
    out = tmp_path / "new" / "out.wav"
    cfg = GenerateConfig(
        model_folder, "codec_ssl_plain_tts", text="one two", output=out, max_len=9, min_len=9
    )
    assert run_generate(cfg) == 0
    wave, rate = soundfile.read(out)
    codec = model.tokenizers.codec
    assert rate == 16000 and len(wave) == len(codec.decode(np.zeros((9, 3), np.int32)))
    captured = capsys.readouterr()
    assert captured.out == "" and "out.wav" in captured.err


def test_speech_to_text_and_continuations(model_folder, recording, tmp_path, capsys):
    assert run_generate(GenerateConfig(model_folder, "asr", audio=recording, max_len=5)) == 0
    first = capsys.readouterr().out
    cfg = GenerateConfig(model_folder, "asr", audio=recording, max_len=5, output=tmp_path / "t.txt")
    assert run_generate(cfg) == 0
    assert capsys.readouterr().out == first == (tmp_path / "t.txt").read_text("utf-8")
    assert run_generate(GenerateConfig(model_folder, "textlm", text="four fi", max_len=5)) == 0
    assert capsys.readouterr().out.startswith("four fi")
    out = tmp_path / "more.wav"
    cfg = GenerateConfig(model_folder, "codec_ssl_audiolm", audio=recording, output=out, max_len=9, min_len=9)
    assert run_generate(cfg) == 0
    assert soundfile.info(out).duration > soundfile.info(recording).duration + 0.1


def test_requests_resume_without_redoing(model_folder, model, recording, tmp_path, monkeypatch):
    lines = [
        {"id": "a", "task": "asr", "audio": "in.wav", "max_len": 4},
        {"id": "b/1", "task": "codec_ssl_plain_tts", "text": "one", "settings": {"seed": 3}, "max_len": 6},
        {"id": "c", "task": "codec_ssl_audiolm", "lang": "en", "min_len": 5},
        {"id": "bad", "task": "asr", "audio": "none.wav"},
    ]
    path, folder = write_lines(tmp_path / "r.jsonl", lines), tmp_path / "out"
    cfg = GenerateConfig(model_folder, requests=path, output_dir=folder, batch_size=2, max_len=7)
    whole = GenerateConfig(model_folder, requests=path, output_dir=tmp_path / "whole", max_len=7)
    assert run_generate(whole) == 1

    # Stop after two results, in the middle of a line.
    add = records.ResultsFolder.add

    def stop(self, request, result):
        if len(self.records) == 2:
            with open(self.folder / records.PARTIAL, "a") as file:
                file.write('{"id": "half')
            raise KeyboardInterrupt
        return add(self, request, result)

    with monkeypatch.context() as patch:
        patch.setattr(records.ResultsFolder, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run_generate(cfg)
    assert not (folder / records.RESULTS).exists()

    asked = []

    def count(self, request, result):
        asked.append(request.id)
        return add(self, request, result)

    monkeypatch.setattr(records.ResultsFolder, "add", count)
    assert run_generate(cfg) == 1
    # One of the two kept records is the failed request, which is tried again.
    assert len(asked) == 3 and "bad" in asked
    mine, theirs = read_lines(folder / records.RESULTS), read_lines(tmp_path / "whole" / records.RESULTS)
    assert [r["id"] for r in mine] == ["a", "b/1", "c", "bad"]
    for one, other in zip(mine, theirs, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0} or one["logprob"] == pytest.approx(
            other["logprob"]
        )
        assert one["ids"] == other["ids"] and one["text"] == other["text"]
    assert not (folder / records.PARTIAL).exists()
    by_id = {r["id"]: r for r in mine}
    assert by_id["bad"]["finished"] == "failed" and "none.wav" in by_id["bad"]["error"]
    assert by_id["b/1"]["settings"]["seed"] == 3 and by_id["b/1"]["settings"]["max_len"] == 6
    assert by_id["c"]["settings"]["max_len"] == 7 and by_id["c"]["request"]["lang"] == "en"
    wave, _ = soundfile.read(folder / by_id["b/1"]["audio"], dtype="float32")
    ids = np.array(by_id["b/1"]["ids"], dtype=np.int32)
    np.testing.assert_allclose(wave, model.tokenizers.decode_codec(ids[:, 1:]), atol=1e-4)

    asked.clear()
    run_generate(cfg)
    assert asked == ["bad"]
    lines[0]["max_len"] = 3
    write_lines(path, lines)
    asked.clear()
    run_generate(cfg)
    assert sorted(asked) == ["a", "bad"]


def test_the_help_shows_how(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = capsys.readouterr().out
    assert out.endswith(EXAMPLES + "\n")


def test_a_setting_for_each_stream_and_several_results(model_folder, model, recording, tmp_path, capsys):
    out = tmp_path / "a.wav"
    common = ["generate", "--model", str(model_folder), "--max-len", "6", "--min-len", "6"]
    tts = ["--task", "codec_ssl_plain_tts", "--text", "one", "-o", str(out)]
    assert main([*common, *tts, "--temperature", "[0.9,0,0.5,2]", "--n-best", "2"]) == 0
    settings = SamplingSettings(temperature=(0.9, 0, 0.5, 2), min_len=6, max_len=6)
    for seed, path in ((0, out), (1, tmp_path / "a.2.wav")):
        request = GenerationRequest(
            "a", "codec_ssl_plain_tts", text="one", settings=replace(settings, seed=seed)
        )
        wave, _ = soundfile.read(path, dtype="float32")
        np.testing.assert_allclose(wave, generate(model, [request])[0].wav, atol=1e-4)
    assert main([*common, *tts, "--temperature", "[0.9,0]"]) == 2
    assert "temperature has 2 values, but the model has 4 streams" in capsys.readouterr().err

    asr = ["--task", "asr", "--audio", str(recording), "--beam-size", "3", "--n-best", "2"]
    assert main([*common, *asr]) == 0
    request = GenerationRequest(
        "a",
        "asr",
        audio=recording,
        settings=SamplingSettings(min_len=6, max_len=6, beam_size=3, n_best=2),
    )
    best = generate(model, [request])[0]
    assert capsys.readouterr().out == f"{best.text}\n{best.alternatives[0].text}\n"


def test_a_given_target_is_scored(model_folder, model, recording, capsys):
    words = ["generate", "--model", str(model_folder), "--task", "asr", "--audio", str(recording)]
    assert main([*words, "--target-text", "one two"]) == 0
    request = GenerationRequest("a", "asr", audio=recording, target_text="one two")
    scored = generate(model, [request])[0]
    assert capsys.readouterr().out.startswith(f"log p {scored.logprob:.4f} over {scored.num_scored} tokens")
    assert main([*words, "--target-text", "one two", "--stream"]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give a task"),
        ({"task": "asr", "output_dir": "x"}, "output_dir goes with requests"),
        ({"requests": "r.jsonl"}, "needs output_dir"),
        ({"requests": "r.jsonl", "output_dir": "x", "text": "a"}, "text cannot be given"),
        ({"task": "asr", "batch_size": 0}, "batch_size"),
        ({"task": "asr", "dtype": "int8"}, "dtype"),
    ],
)
def test_bad_configs(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(tmp_path, **options)


def test_bad_single_requests(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="-o out.wav"):
        run_generate(GenerateConfig(model_folder, "codec_ssl_plain_tts", text="one"))
    with pytest.raises(GenerationError, match="names several trained tasks"):
        run_generate(GenerateConfig(model_folder, "tts", text="one"))
    with pytest.raises(GenerationError, match="audio is missing"):
        run_generate(GenerateConfig(model_folder, "asr"))
    with pytest.raises(ConfigError, match="device"):
        run_generate(GenerateConfig(model_folder, "asr", device="toaster"))
    results = tmp_path / "results.jsonl"
    results.write_text("no record\n")
    (tmp_path / "r.jsonl").write_text('{"id": "a", "task": "textlm"}\n')
    with pytest.raises(GenerationError, match="line 1: not a generation record"):
        run_generate(GenerateConfig(model_folder, requests=tmp_path / "r.jsonl", output_dir=tmp_path))


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        records.ResultsFolder(tmp_path / "file" / "out", "m", "h")


def test_records_keep_separators_and_refuse_a_key_twice(tmp_path):
    from speechlm_ext.generation.requests import results_folder as records

    text = "one\u2028two\x85three"
    path = tmp_path / "results.jsonl"
    path.write_text(records._lines([{"id": "a", "text": text}, {"id": "b", "text": "x"}]), "utf-8")
    assert {name: row["text"] for name, row in records._read(path, partial=False).items()} == {
        "a": text,
        "b": "x",
    }
    path.write_text('{"id": "a", "text": "x", "text": "y"}\n')
    with pytest.raises(GenerationError, match="line 1: not a generation record: key 'text' occurs twice"):
        records._read(path, partial=False)


def test_a_damaged_model_is_refused_unless_it_is_wanted(model_folder, tmp_path, capsys):
    damaged = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 0x80  # the sign of a weight
    (damaged / "model.safetensors").write_bytes(weights)
    command = ["generate", "--model", str(damaged), "--task", "textlm", "--text", "one", "--max-len", "2"]
    assert main(command) == 2
    assert f"{damaged / 'model.safetensors'} is damaged or truncated" in capsys.readouterr().err
    assert main([*command, "--verify", "false"]) == 0
