"""Manifests: what is read, and one clear error with file and line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speechlm_ext.data.manifest import read_manifest, scan_manifest
from speechlm_ext.errors import ManifestError

GOOD = {
    "id": "a",
    "audio": "wav/a.wav",
    "text": "hé",
    "speaker": 7,
    "lang": "fr",
    "start": 1,
    "duration": 0.5,
}


def write(folder: Path, *lines: object) -> Path:
    (folder / "wav").mkdir(exist_ok=True)
    (folder / "wav" / "a.wav").write_bytes(b"x")
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def test_reads_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD, b"", {"id": "b", "text": "only text", "dataset": "books"}, b"  ")
    a, b = read_manifest(path)
    assert (a.id, a.text, a.speaker, a.lang, a.dataset, a.start, a.duration) == (
        "a",
        "hé",
        "7",
        "fr",
        "train",
        1,
        0.5,
    )
    assert a.audio == tmp_path / "wav" / "a.wav" and a.where == f"{path}:1: utterance 'a'"
    assert (b.id, b.audio, b.dataset, b.line) == ("b", None, "books", 3)
    # Paths are relative to the manifest, wherever the command runs and however the manifest is named.
    monkeypatch.chdir(tmp_path)
    assert read_manifest("train.jsonl")[0].audio == a.audio


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "x", "text": "t"}\r\n{"id": "y", "text": "t"}\r\n')
    assert [u.id for u in read_manifest(path)] == ["x", "y"]


def test_unknown_keys_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"id": "1", "text": "t", "speakr": "s"}, {"id": "2", "text": "t", "speakr": "s", "n": 1}
    )
    scan = scan_manifest(path)
    assert scan.unknown_keys == {"speakr": 2, "n": 1} and len(scan.utterances) == 2


BAD = {
    "not-utf8": (b'{"id": "b", "text": "\xe9"}', "not UTF-8: byte 0xe9 at offset 21"),
    "bad-json": (b'{"id": "b"', "not JSON"),
    "not-object": (b"[1]", "expected a JSON object, got list"),
    "no-id": ({"text": "t"}, "no 'id'"),
    "blank-id": ({"id": " ", "text": "t"}, "'id' must be a string that is not blank"),
    "duplicate": ({"id": "a", "text": "t"}, "id 'a' is already in line 1"),
    "neither": ({"id": "b"}, "'b' has neither 'audio' nor 'text'"),
    "blank-text": ({"id": "b", "text": ""}, "'text' must be a string that is not blank"),
    "text-is-number": ({"id": "b", "text": 3}, "'text' must be a string"),
    "missing-audio": ({"id": "b", "audio": "wav/none.wav"}, "'b': audio file .*wav/none.wav does not exist"),
    "negative-start": ({"id": "b", "text": "t", "start": -1}, "'start' must be a number of seconds, >= 0"),
    "no-duration": ({"id": "b", "text": "t", "duration": 0}, "'duration' must be a number of seconds, > 0"),
    "nan": (b'{"id": "b", "text": "t", "duration": NaN}', "'duration' must be"),
    "key-twice": (b'{"id": "b", "text": "t", "speaker": "x", "text": "t"}', "key 'text' occurs twice"),
    "id-twice": (b'{"id": "b", "text": "t", "id": "c"}', "key 'id' occurs twice"),
    "nested-key-twice": (b'{"id": "b", "text": "t", "x": {"k": 1, "k": 2}}', "key 'k' occurs twice"),
    "deep": (b'{"id": "b", "text": ' + b"[" * 100000, "nested too deeply"),
    "surrogate": (b'{"id": "b", "text": "\\ud800"}', "lone surrogate"),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD.keys())
def test_bad_line_is_named_or_collected(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, GOOD, line, {"id": "z", "text": "t"})
    with pytest.raises(ManifestError, match=f"train.jsonl:2: .*{message}"):
        read_manifest(path)
    scan = scan_manifest(path)
    assert [u.id for u in scan.utterances] == ["a", "z"]
    assert [(r.line, r.manifest) for r in scan.rejected] == [(2, str(path))]


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_or_missing_manifest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(ManifestError, match="m.jsonl cannot be read"):
        read_manifest(path)
    path.write_bytes(content)
    for read in (read_manifest, scan_manifest):
        with pytest.raises(ManifestError, match="m.jsonl is empty"):
            read(path)
