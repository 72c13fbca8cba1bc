"""Atomic files: the old content survives any failure, names reach the disk, rights are those of a plain ``open()``, and
a full disk is one clear error."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speechlm_ext.errors import StorageError
from speechlm_ext.utils.files.io import (
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    make_folder,
    sha256_file,
    storage_error,
)


def test_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write_text(path, "eins")
    atomic_write_text(path, "zwei é")
    assert path.read_text("utf-8") == "zwei é" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_rights_are_those_of_open(tmp_path: Path, umask: int) -> None:
    """Also where a library puts a file of its own in place, as safetensors does with mode 600."""
    before = os.umask(umask)
    try:
        (tmp_path / "open").write_text("x")
        (tmp_path / "mkdir").mkdir()
        atomic_write_text(tmp_path / "made" / "text", "x")
        with atomic_path(tmp_path / "made" / "w.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)

    def rights(path: Path) -> int:
        return path.stat().st_mode & 0o777

    assert rights(tmp_path / "open") == 0o666 & ~umask
    assert rights(tmp_path / "made" / "text") == rights(tmp_path / "made" / "w.safetensors") == 0o666 & ~umask
    assert rights(tmp_path / "made") == rights(tmp_path / "mkdir") == 0o777 & ~umask


def test_the_umask_of_the_process_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of other threads would get the rights of the moment."""

    def forbidden(_: int) -> int:
        raise AssertionError("os.umask was called")

    monkeypatch.setattr(os, "umask", forbidden)
    atomic_write_text(tmp_path / "x", "y")
    assert (tmp_path / "x").read_text() == "y"


def test_content_reaches_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        done.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        done.append(("name", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic_write_text(tmp_path / "a" / "b" / "x", "y")
    file, b, a = (p.stat().st_ino for p in (tmp_path / "a/b/x", tmp_path / "a/b", tmp_path / "a"))
    # First the new folders' names, in the folders above them.
    assert done[:2] == [("sync", tmp_path.stat().st_ino), ("sync", a)]
    assert done[2:] == [("sync", file), ("name", file), ("sync", b)]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems cannot; a disk that fails while it is flushed is one."""
    fsync, answer = os.fsync, errno.EINVAL

    def no_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(answer, os.strerror(answer))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    atomic_write_text(tmp_path / "x", "y")
    make_folder(tmp_path / "a" / "b")
    answer = errno.EIO
    with pytest.raises(StorageError, match="could not write"):
        atomic_write_text(tmp_path / "x", "z")


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


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127, "x." + "s" * 253):
        atomic_write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_never_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "scores.json"
    atomic_write_json(path, {"ppl": 3.5})
    with pytest.raises(
        StorageError, match=rf"scores\.json was not written: its value tts\.parts\[1\] would be {value}"
    ):
        atomic_write_json(path, {"tts": {"parts": [1.0, value]}})
    assert path.read_text() == '{\n  "ppl": 3.5\n}\n' and len(list(tmp_path.iterdir())) == 1


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_storage_error_is_an_os_error_with_the_system_s_number(tmp_path):
    full = storage_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "a")
    assert (
        isinstance(full, OSError) and full.errno == errno.ENOSPC and str(full).startswith("could not write ")
    )
    # Where an outer block catches OSError too, the first message stays.
    again = storage_error(full, tmp_path / "outer")
    assert str(again) == str(full) and again.errno == errno.ENOSPC
    assert str(pickle.loads(pickle.dumps(full))) == str(full)
