"""Atomic file writing: a reader sees the old file or the whole new one, never half of it.

The new content goes to a temporary file in the same folder, is flushed to the disk, and takes the
name with ``os.replace``. A full disk leaves the old file untouched and raises :class:`StorageError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechlm_ext.errors import StorageError
from speechlm_ext.utils.json_text import json_document


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn an ``OSError`` of a write into a message that names the file and the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with contextlib.suppress(OSError):
            stat = os.statvfs(path.parent)
            free = f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB"
        return StorageError(
            f"could not write {path}: the disk is full ({free} free in {path.parent}). What was written "
            "before is intact; free some space or choose another folder, then run the same command again."
        )
    return StorageError(
        f"could not write {path}: {error.strerror or error}. Check the folder and its rights."
    )


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes that name, on failure it is removed.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise storage_error(error, path) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; the final file gets the rights a plain open() would give.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
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
    """Write ``value`` as readable JSON to ``path`` atomically. Raises :class:`StorageError`."""
    atomic_write_text(path, json_document(value))


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
