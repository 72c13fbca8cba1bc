"""A killed run over a requests file: nothing finished is decoded again, nothing is lost, nothing comes twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from python_tests.generation.conftest import make_wave
from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.commands.generate import GenerateConfig, run_generate
from speechlm_ext.generation.requests import results_folder as records


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


NUM_REQUESTS = 30


@pytest.fixture
def files(tmp_path):
    """A requests file of speech and text, long enough to be killed in its middle."""
    write_wav(tmp_path / "in.wav", make_wave(0.3, 2), 16000)
    lines = []
    for n in range(NUM_REQUESTS):
        if n % 3:
            line = {"id": f"u{n}", "task": "codec_ssl_plain_tts", "text": "one two", "seed": n}
            lines.append({**line, "min_len": 20, "max_len": 20, "n_best": 1 + n % 2})
        else:
            lines.append({"id": f"u{n}", "task": "asr", "audio": "in.wav", "max_len": 9})
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def asked(monkeypatch):
    """Ids of the requests that are decoded, in the order of their records."""
    ids, add = [], records.ResultsFolder.add
    monkeypatch.setattr(records.ResultsFolder, "add", lambda self, q, r: ids.append(q.id) or add(self, q, r))
    return ids


def test_a_killed_run_goes_on(model_folder, files, tmp_path, asked):
    whole = GenerateConfig(model_folder, requests=files, output_dir=tmp_path / "whole", batch_size=4)
    assert run_generate(whole) == 0
    asked.clear()

    out = tmp_path / "out"
    partial = out / records.PARTIAL
    command = ["generate", "--model", model_folder, "--requests", files, "--output-dir", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "speechlm_ext.cli", *map(str, command), "--batch-size", "4"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if partial.exists() and partial.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= partial.read_bytes().count(b"\n") < NUM_REQUESTS and not (out / records.RESULTS).exists()
    # A killed write may also leave a record without its end.
    done = [line["id"] for line in read_lines(partial)]
    with open(partial, "ab") as file:
        file.write(json.dumps(read_lines(partial)[-1] | {"id": "u29"}).encode()[:-40])
    (out / "wav" / ".u29.wav.abc.wav").write_bytes(b"RIFF")
    (out / ".results.jsonl.abc.jsonl").write_bytes(b"{")

    cfg = GenerateConfig(model_folder, requests=files, output_dir=out, batch_size=4)
    assert run_generate(cfg) == 0
    ids = [f"u{n}" for n in range(NUM_REQUESTS)]
    assert len(done) == len(set(done)) and sorted(done + asked) == sorted(ids)
    mine, theirs = read_lines(out / records.RESULTS), read_lines(tmp_path / "whole" / records.RESULTS)
    assert [r["id"] for r in mine] == ids
    for one, other in zip(mine, theirs, strict=True):
        assert (one["ids"], one["text"], one["finished"]) == (other["ids"], other["text"], other["finished"])
        for a, b in zip(
            [one, *one.get("alternatives", [])], [other, *other.get("alternatives", [])], strict=True
        ):
            assert a["audio"] == b["audio"] and a["ids"] == b["ids"]
            if a["audio"] is not None:
                wave, _ = soundfile.read(out / a["audio"])
                np.testing.assert_allclose(
                    wave, soundfile.read(tmp_path / "whole" / b["audio"])[0], atol=1e-3
                )
    assert not partial.exists() and not list(out.rglob(".*"))


@pytest.mark.parametrize("kept", ["nothing", "half", "all but the newline", "all"])
def test_a_record_that_was_cut_anywhere(model_folder, files, tmp_path, asked, kept):
    """The next record begins a line of its own, so that the file can be read again and again."""
    files.write_text("".join(files.read_text().splitlines(keepends=True)[:3]))
    out = tmp_path / "out"
    cfg = GenerateConfig(model_folder, requests=files, output_dir=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.ResultsFolder, "close", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_generate(cfg)
        lines = (out / records.PARTIAL).read_bytes().splitlines(keepends=True)
        last = {"nothing": b"", "half": lines[2][:-99], "all but the newline": lines[2][:-1], "all": lines[2]}
        (out / records.PARTIAL).write_bytes(b"".join(lines[:2]) + last[kept])
        for _ in range(2):  # stopped again behind the last record
            with pytest.raises(KeyboardInterrupt):
                run_generate(cfg)
        assert (out / records.PARTIAL).read_bytes().count(b"\n") == 3
    asked.clear()
    assert run_generate(cfg) == 0 and asked == []
    assert len({r["id"] for r in read_lines(out / records.RESULTS)}) == 3


def test_a_recording_of_the_same_size_is_another_request(model_folder, files, tmp_path, asked):
    files.write_text(files.read_text().splitlines()[0])
    cfg = GenerateConfig(model_folder, requests=files, output_dir=tmp_path / "out")
    run_generate(cfg)
    asked.clear()
    run_generate(cfg)
    assert asked == []
    size = (tmp_path / "in.wav").stat().st_size
    write_wav(tmp_path / "in.wav", make_wave(0.3, 1), 16000)
    assert (tmp_path / "in.wav").stat().st_size == size
    run_generate(cfg)
    assert asked == ["u0"]
    asked.clear()
    run_generate(GenerateConfig(model_folder, requests=files, output_dir=tmp_path / "out", dtype="bfloat16"))
    assert asked == ["u0"]


def test_a_shorter_file_loses_nothing(model_folder, files, tmp_path, asked):
    lines = files.read_text().splitlines(keepends=True)[:4]
    out = tmp_path / "out"
    cfg = GenerateConfig(model_folder, requests=files, output_dir=out)
    for chosen, served in ((lines[:3], 3), (lines[1:2], 0), (["{"], 0), (lines[2:], 1), (lines, 0)):
        files.write_text("".join(chosen))
        asked.clear()
        run_generate(cfg)
        assert len(asked) == served
        wanted = ["line 1" if line == "{" else json.loads(line)["id"] for line in chosen]
        assert [r["id"] for r in read_lines(out / records.RESULTS)] == wanted
    assert not (out / records.PARTIAL).exists()


def test_one_run_at_a_time_writes_into_a_folder(model_folder, files, tmp_path):
    files.write_text(files.read_text().splitlines()[0])
    folder = records.ResultsFolder(tmp_path / "out", "m", "h")
    cfg = GenerateConfig(model_folder, requests=files, output_dir=tmp_path / "out")
    with pytest.raises(GenerationError, match="another run is writing into"):
        run_generate(cfg)
    folder.release()
    assert run_generate(cfg) == 0
