"""Files of requests: a bad line is told in its own record and stops no other line."""

from __future__ import annotations

import json

import pytest

from python_tests.generation.conftest import make_wave
from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation import GenerationRequest
from speechlm_ext.generation.commands.generate import GenerateConfig, run_generate
from speechlm_ext.generation.requests.request_file import RejectedRequest, read_requests

GOOD = b'{"id": "good", "task": "textlm", "max_len": 2}'


@pytest.mark.parametrize(
    "line, name, message",
    [
        (b'{"id": "a", "task": "asr"', "line 2", "line 2: not JSON"),
        (b'{"id": "a", "ta', "line 2", "line 2: not JSON"),
        (b"[" * 100_000, "line 2", "line 2: not JSON"),
        (b"[1]", "line 2", "expected a JSON object, got list"),
        (b"null", "line 2", "expected a JSON object, got NoneType"),
        (GOOD, "line 2", "line 1 has the id 'good' already"),
        (b'{"task": "asr"}', "line 2", "id missing"),
        (b'{"id": 5, "task": "asr"}', "line 2", "id that is a non-empty string, got 5"),
        (b'{"id": ["a"], "task": "asr"}', "line 2", "id that is a non-empty string"),
        (b'{"id": "a"}', "a", "task missing"),
        (b'{"id": "a", "task": "asr", "tempo": 1}', "a", "unknown keys ['tempo']"),
        (b'{"id": "a", "task": "asr", "settings": 5}', "a", "settings must be an object, got int"),
        (b'{"id": "a", "task": "asr", "settings": {"tempo": 1}}', "a", "unknown keys ['tempo']"),
        (b'{"id": "a", "task": "asr", "audio": 5}', "a", "audio must be a path"),
        (b'{"id": "a", "task": "asr", "audio": "a\\u0000.wav"}', "a", "zero byte"),
        (b'{"id": "a", "task": "asr", "resample": "no"}', "a", "resample must be true or false"),
        (b'{"id": "a", "task": "textlm", "text": "\\ud800"}', "line 2", "lone surrogate"),
        (b'{"id": "\\ud800", "task": "textlm"}', "line 2", "lone surrogate"),
        (b'{"id": "a", "task": "asr", "top_k": 0}', "a", "line 2: sampling settings: top_k"),
        (b'{"id": "a", "task": "asr", "temperature": NaN}', "a", "temperature must be a finite number from"),
        (b'{"id": "a", "task": "asr", "min_len": 3, "max_len": 2}', "a", "can never end"),
    ],
)
def test_a_bad_line_is_refused_alone(line, name, message, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD.replace(b"good", b"other"))
    first, bad, last = read_requests(path, {})
    assert isinstance(first, GenerationRequest) and isinstance(last, GenerationRequest)
    assert (first.id, bad.id, last.id) == ("good", name, "other")
    assert isinstance(bad, RejectedRequest) and message in bad.error and "line 2" in bad.error


@pytest.mark.parametrize("content, message", [(b" \n\n", "holds no requests"), (b"\xff\n", "not UTF-8")])
def test_files_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(GenerationError, match=message):
        read_requests(tmp_path / "r.jsonl", {})
    with pytest.raises(GenerationError, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl", {})


def test_lines_end_at_newlines_only(tmp_path):
    """JSON may hold the separators that ``str.splitlines`` cuts at, and some editors write a byte order mark."""
    text = "one\u2028two\u0085three\x1cfour"
    data = json.dumps({"id": "a", "task": "textlm", "text": text}, ensure_ascii=False)
    assert len(data.splitlines()) > 1
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + data.encode() + b"\r\n")
    (request,) = read_requests(tmp_path / "r.jsonl", {})
    assert request.text == text


def test_defaults_fill_what_a_line_leaves_out(tmp_path):
    lines = [
        {"id": "a"},
        {"id": "b", "task": "tts", "max_len": 4, "settings": {"min_len": 2}, "resample": False},
        {"id": "c", "min_len_ratio": 0.5, "max_len_ratio": 3},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    defaults = {"task": "asr", "lang": "en", "resample": True, "max_len_ratio": 2.0, "min_len": 9, "seed": 5}
    a, b, c = read_requests(tmp_path / "r.jsonl", defaults)
    assert (a.task, a.lang, a.resample) == ("asr", "en", True)
    assert (a.settings.max_len_ratio, a.settings.min_len, a.settings.seed) == (2.0, 9, 5)
    assert (b.task, b.resample) == ("tts", False)
    assert (b.settings.max_len, b.settings.max_len_ratio, b.settings.min_len) == (4, None, 2)
    assert (c.settings.min_len, c.settings.min_len_ratio, c.settings.max_len_ratio) == (1, 0.5, 3)


def test_the_rest_of_a_file_is_served(model_folder, tmp_path, capsys):
    write_wav(tmp_path / "in.wav", make_wave(0.3, 2), 16000)
    write_wav(tmp_path / "slow.wav", make_wave(0.3, 2), 8000)
    lines = [
        '{"id": "a", "task": "asr", "audio": "in.wav", "max_len": 3}',
        '{"id": "rate", "task": "asr", "audio": "slow.wav", "resample": false}',
        '{"id": "k", "task": "asr", "audio": "in.wav", "top_k": 0}',
        '{"id": "a", "task": "asr", "audio": "in.wav"}',
        json.dumps({"id": "name", "task": "asr", "audio": "x" * 5000}),
        json.dumps({"id": "long", "task": "textlm", "text": "one two " * 400}),
        '{"id": "cut',
        '{"id": "b", "task": "codec_ssl_plain_tts", "text": "one", "max_len": 3}',
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    cfg = GenerateConfig(model_folder, requests=tmp_path / "r.jsonl", output_dir=tmp_path / "out")
    assert run_generate(cfg) == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == ["a", "rate", "k", "line 4", "name", "long", "line 7", "b"]
    assert [r["finished"] == "failed" for r in records] == [False] + [True] * 6 + [False]
    assert all((r["error"] is None) == (r["finished"] != "failed") for r in records)
    assert "8000 Hz" in records[1]["error"] and "context" in records[5]["error"]
    assert records[2]["request"]["audio"] == "in.wav" and records[2]["task"] == "asr"
    assert "2 of 8 requests succeeded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"id": "a", "task": "textlm", "text": "x", "text": "y"}', "text"),
        ('{"id": "a", "task": "textlm", "text": "x", "settings": {"top_k": 1, "top_k": 2}}', "top_k"),
        ('{"id": "a", "task": "textlm", "text": "x", "seed": 1, "settings": {"seed": 2}}', "seed"),
    ],
)
def test_a_key_twice_is_refused_by_name(tmp_path, line, key):
    (tmp_path / "r.jsonl").write_text(line + '\n{"id": "b", "task": "textlm", "text": "x"}\n')
    refused, request = read_requests(tmp_path / "r.jsonl", {})
    assert f"r.jsonl, line 1: key '{key}' occurs twice" in refused.error or (
        f"r.jsonl, line 1: '{key}' is given beside the other keys and under 'settings'" in refused.error
    )
    assert request.id == "b"
