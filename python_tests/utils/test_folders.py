"""Folders that users name: linked ones are read, each file once, and what is left out is counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from speechlm_ext.errors import AudioError
from speechlm_ext.utils.files.folders import find_files


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def names_of(folder: Path, **how: bool) -> tuple[list[str], dict[str, int]]:
    found = find_files(folder, (".wav", ".flac"), AudioError, **how)
    return [str(p.relative_to(folder)) for p in found.files], dict(found.left_out)


def test_links_are_followed_and_hidden_files_counted(tmp_path):
    make(tmp_path / "else", "u2.wav", "deep/u3.FLAC")
    make(tmp_path / "far", "u4.wav")
    make(
        tmp_path / "set",
        "s1/u1.wav",
        "s1/._u1.wav",
        ".trash/a.wav",
        "__MACOSX/s1/._u1.wav",
        "s1/u1.txt",
        "README",
    )
    (tmp_path / "set" / "s2").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "u4.wav").symlink_to(tmp_path / "far" / "u4.wav")
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "set" / "self.wav").symlink_to("self.wav")
    os.mkfifo(tmp_path / "set" / "pipe.wav")
    files, left_out = names_of(tmp_path / "set")
    assert files == ["s1/u1.wav", "s2/deep/u3.FLAC", "s2/u2.wav", "u4.wav"]
    assert left_out == {
        "hidden files": 1,
        "hidden folders": 2,
        "links to nothing": 2,
        "devices or pipes": 1,
        "files *.txt": 1,
        "files without ending": 1,
    }
    assert "2 hidden folders" in str(find_files(tmp_path / "set", (".wav",), AudioError))


def test_no_file_comes_twice_and_circles_end(tmp_path):
    make(tmp_path, "set/a/x.wav", "set/b/y.wav", "set/z.wav", "beside/w.wav")
    (tmp_path / "set" / "a" / "up").symlink_to("..")
    (tmp_path / "set" / "a0").symlink_to("b")  # sorts before b, whose own name is taken all the same
    (tmp_path / "set" / "parent").symlink_to(tmp_path)
    (tmp_path / "set" / "0.wav").symlink_to("z.wav")
    files, left_out = names_of(tmp_path / "set")
    assert files == ["a/x.wav", "b/y.wav", "parent/beside/w.wav", "z.wav"]
    assert left_out == {
        "links to files that were found already": 1,
        "links to folders that were read already": 3,
    }
    (tmp_path / "link").symlink_to("set")
    assert names_of(tmp_path / "link")[0] == files


def test_one_floor(tmp_path):
    make(tmp_path, "a.wav", "b/c.wav", "d.txt", "._a.wav")
    assert names_of(tmp_path, recursive=False) == (["a.wav"], {"sub-folders": 1, "hidden files": 1})


def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a/x.wav", "b/y.wav")
    scan = os.scandir

    def denied(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(AudioError, match=r"b cannot be read \(Permission denied\)"):
        names_of(tmp_path)
    monkeypatch.undo()
    with open(os.fsencode(tmp_path) + b"/a/\xff.wav", "wb"):
        pass
    with pytest.raises(AudioError, match="not UTF-8.*rename it"):
        names_of(tmp_path)
