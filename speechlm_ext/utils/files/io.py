"""Atomic file writing: a reader sees the old file or the whole new one, never half of it.

The new content goes to a temporary file in the same folder, is flushed to the disk, and takes the
name with ``os.replace``; then the folder is flushed, so that the name survives a power cut. A full disk leaves the old
file untouched and raises :class:`StorageError`. Files and folders get the rights that ``open()`` and ``mkdir()`` would
give them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechlm_ext.errors import StorageError
from speechlm_ext.utils.files.json_text import json_document

#: Errors of file systems that cannot flush a folder, and of folders that may not be opened.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS)


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn the ``OSError`` of a write into one with file and remedy; a StorageError keeps its message."""
    message = f"could not write {path}: {error.strerror or error}. Check the folder and its rights."
    if isinstance(error, StorageError):
        message = str(error)
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with contextlib.suppress(OSError):
            stat = os.statvfs(path.parent)
            free = f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB"
        message = (
            f"could not write {path}: the disk is full ({free} free in {path.parent}). What was written "
            "before is intact; free some space or choose another folder, then run the same command again."
        )
    problem = StorageError(message)
    problem.errno = error.errno
    return problem


def sync_file(path: str | Path) -> None:
    """Flush a file's content to the disk. Raises ``OSError``."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Flush a folder's names to the disk if the file system can. Raises ``OSError``."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def make_folder(path: str | Path) -> None:
    """Make a folder and its missing parents, and flush their names to the disk. Raises ``OSError``."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes that name, on failure it is removed.

    The file gets the rights that ``open()`` gives a new file, even if a library writes it with others.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # Cut: the file's own name may be as long as file systems allow. Some writers choose the format by the suffix.
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    temporary = path.parent / f".{path.name[:24]}.tmp-{secrets.token_hex(8)}{suffix}"
    try:
        make_folder(path.parent)
        # O_EXCL: the file is ours. The system applies the umask, which cannot be read without changing it.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            rights = os.fstat(handle).st_mode & 0o777
        finally:
            os.close(handle)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        yield temporary
        # safetensors puts a private file (0600) of its own there.
        if temporary.stat().st_mode & 0o777 != rights:
            os.chmod(temporary, rights)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    except Exception as error:
        # Libraries that write by themselves (safetensors) wrap the system's error in one of their own.
        if "No space left on device" in str(error):
            raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically. Raises :class:`StorageError`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically. Raises :class:`StorageError`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable JSON to ``path`` atomically.

    Raises:
        StorageError: it cannot be written, or holds a number that is not finite: JSON has none, and
            :func:`speechlm_ext.utils.files.json_text.parse_json` would refuse the file.
    """
    for place, number in _not_finite(value, ""):
        raise StorageError(
            f"{path} was not written: its value {place or 'itself'} would be {number}, but JSON has finite numbers "
            "only. The file on the disk is unchanged; the numbers behind this value are wrong or too large."
        )
    atomic_write_text(path, json_document(value))


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Place and value of the numbers in a JSON value that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{place}[{index}]")


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a JSON value as 64 hex digits; the order of keys in its objects does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
