"""The folders of a run's checkpoints: naming, removing and finding them.

A folder is a checkpoint if it is named ``step-N`` and has its state. It gets that name only when all of it is on the
disk, and loses it before any of it is removed, so a folder with such a name is complete even after a kill. Folders that
a kill leaves under hidden names are removed by :func:`recover`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
from pathlib import Path

from speechlm_ext.utils.files.io import atomic_write_text, storage_error, sync_file, sync_folder
from speechlm_ext.utils.files.json_text import parse_json

STATE_NAME = "trainer_state.json"
LATEST = "latest"
_INCOMPLETE, _REPLACED, _REMOVED = ".incomplete-", ".replaced-", ".removed-"
_STEP = re.compile(r"step-(\d+)", re.ASCII)
logger = logging.getLogger("speechlm_ext")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[Path]:
    """Folders named ``step-N`` in the folder ``root``, by number."""
    found = [(step_of(p), p) for p in root.glob("step-*") if p.is_dir()]
    return [p for _, p in sorted((s, p) for s, p in found if s is not None)]


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints in the folder ``root``, oldest first."""
    return [p for p in step_folders(root) if (p / STATE_NAME).is_file()]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint in the folder ``root``, whatever ``latest`` names."""
    found = list_checkpoints(root)
    return found[-1] if found else None


def resolve_latest(path: Path) -> Path:
    """The folder named by a text file ``latest``, as on file systems without links; other paths unchanged."""
    if path.name != LATEST or not path.is_file():
        return path
    try:
        target = path.parent / path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return path
    return target if step_of(target) is not None else path


def incomplete_name(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it gets its name."""
    return folder.with_name(f"{_INCOMPLETE}{folder.name}")


def publish(folder: Path) -> None:
    """Flush ``incomplete_name(folder)`` to the disk and rename it to ``folder``, replacing one of that name atomically.

    Raises:
        OSError: it cannot be flushed or renamed; an existing ``folder`` is kept.
    """
    incomplete, replaced = incomplete_name(folder), folder.with_name(f"{_REPLACED}{folder.name}")
    for where, _, files in os.walk(incomplete, topdown=False):
        for file in files:
            sync_file(Path(where) / file)
        sync_folder(where)
    if not folder.exists():
        os.replace(incomplete, folder)
    elif not _exchange(incomplete, folder):
        # Two renames; recover() repairs a kill between them.
        _clear(replaced)
        os.replace(folder, replaced)
        try:
            os.replace(incomplete, folder)
        except OSError:
            os.replace(replaced, folder)
            raise
    sync_folder(folder.parent)
    _clear(incomplete)
    _clear(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system can (Linux; most of its file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(folder: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a kill leaves nothing that counts as one."""
    removed = folder.with_name(f"{_REMOVED}{folder.name}")
    _clear(removed)
    try:
        os.replace(folder, removed)
        sync_folder(folder.parent)
    except OSError as error:
        logger.warning("the old checkpoint %s cannot be removed: %s", folder, error.strerror or error)
        return
    _clear(removed)


def recover(root: Path) -> None:
    """Remove half-written and half-removed checkpoints that a kill left in the folder ``root``; a checkpoint that was
    moved away for a successor which never came gets its name back.

    A folder ``latest``, which a copy that follows links makes, is renamed too.

    Raises:
        StorageError: one of them cannot be renamed.
    """
    for replaced in root.glob(f"{_REPLACED}step-*"):
        folder = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if not folder.exists():
            try:
                os.replace(replaced, folder)
                sync_folder(root)
            except OSError as error:
                raise storage_error(error, folder) from error
    _free_latest(root)
    for prefix in (_INCOMPLETE, _REPLACED, _REMOVED):
        for left in root.glob(f"{prefix}step-*"):
            _clear(left)
    for link in root.glob(f".{LATEST}-*"):
        with contextlib.suppress(OSError):
            link.unlink()


def _free_latest(root: Path) -> None:
    """A folder ``latest`` is a copy of a checkpoint, and maybe the only one: rename it to its step, or to
    ``latest-copy`` if the run has that step already."""
    latest = root / LATEST
    if latest.is_symlink() or not latest.is_dir():
        return
    aside = (root / f"{LATEST}-copy{number}" for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    own = _named_by_state(latest)
    name = own if own is not None and not own.exists() else next(path for path in aside if not path.exists())
    try:
        os.replace(latest, name)
        sync_folder(root)
    except OSError as error:
        raise storage_error(error, latest) from error
    logger.warning(
        "%s was a folder, not a link, as after a copy that follows links; it is now %s%s",
        latest,
        name.name,
        "" if name == own else "; delete it if it is not wanted",
    )


def _named_by_state(folder: Path) -> Path | None:
    """The path that a checkpoint's own state gives it; None without a state."""
    try:
        step = parse_json((folder / STATE_NAME).read_bytes())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    is_count = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    return folder.with_name(checkpoint_name(step)) if is_count else None


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(
            "%s is left from an earlier run and cannot be removed: %s", folder, error.strerror or error
        )


def point_latest(folder: Path) -> None:
    """Point ``latest`` beside the checkpoint to it: a link, else a text file. Raises ``OSError``."""
    latest, link = folder.with_name(LATEST), folder.with_name(f".{LATEST}-{os.getpid()}")
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(folder.name)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        atomic_write_text(latest, f"{folder.name}\n")
        return
    os.replace(link, latest)
    sync_folder(folder.parent)
