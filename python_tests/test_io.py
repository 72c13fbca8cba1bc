"""Atomic files: the old content survives any failure, and a full disk is one clear error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from speechlm_ext.errors import StorageError
from speechlm_ext.utils.io import atomic_path, atomic_write_text, sha256_file


def test_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write_text(path, "eins")
    atomic_write_text(path, "zwei é")
    assert path.read_text("utf-8") == "zwei é" and [p.name for p in path.parent.iterdir()] == ["b.txt"]
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    atomic_write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"disk is full .* free"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
