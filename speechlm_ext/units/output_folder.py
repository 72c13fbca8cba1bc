"""Output folders of the commands: a record of settings and input, so that no other command resumes; rejected items."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speechlm_ext.data.manifest import Rejected, Utterance
from speechlm_ext.errors import ConfigError, KMeansError
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.json_text import json_line
from speechlm_ext.utils.text import counted

REJECTED = "rejected.jsonl"
_PIECE_BYTES = 4096


def check_owner(
    folder: Path,
    found: Mapping[str, Any] | None,
    record: Mapping[str, Any],
    *,
    contents: Mapping[str, str],
    written: Sequence[Path],
    free: Collection[str] = (),
) -> None:
    """Refuse a folder of another command (:class:`ConfigError`), naming the first difference.

    ``found`` is the folder's record, None if it has none; ``record`` is this command's, all that determines its
    results. ``contents`` maps keys that describe the content of files to the option that names the files; ``free`` keys
    may differ. No path in ``written`` may exist in a folder without a record.
    """
    if found is None:
        foreign = next((path for path in written if path.exists()), None)
        if foreign is not None:
            raise ConfigError(
                f"{foreign} exists already and was written by another command; choose another output_dir."
            )
        return
    for name in sorted({*found, *record}):
        old, new = found.get(name), record.get(name)
        if old == new or name in free:
            continue
        if name in contents:
            raise ConfigError(
                f"{folder} holds results for other {name}: files of {contents[name]} were added, removed or changed "
                f"since. Choose another output_dir, delete {folder} to use the present files, or restore the old ones."
            )
        raise ConfigError(
            f"{folder} holds results with {name} = {repr(old)[:80]}, not {new!r}. Choose another output_dir, or give "
            "the same settings to resume."
        )


def content_key(path: Path, num_pieces: int = 64) -> list[Any]:
    """Size of a file and a sha256 over ``num_pieces`` >= 2 pieces of it, as JSON.

    Distinguishes files of one name and size, such as the same recordings' features of another layer, without reading
    them completely. Raises ``OSError``.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(num_pieces):
            file.seek(max(0, size - _PIECE_BYTES) * i // (num_pieces - 1))
            digest.update(file.read(_PIECE_BYTES))
    return [size, digest.hexdigest()]


def shard_keys(paths: Sequence[Path]) -> list[list[Any]]:
    """Names and content keys of feature shards, as JSON."""
    return [[path.name, *content_key(path)] for path in paths]


def recording_keys(utterances: Sequence[Utterance]) -> list[list[Any]]:
    """Keys that distinguish recordings, as JSON: ids, file names, sizes, some of their bytes, part of the file."""
    keys = {path: _recording_key(path) for path in {u.audio for u in utterances} if path is not None}
    return [[u.id, u.audio and [u.audio.name, *keys[u.audio]], u.start, u.duration] for u in utterances]


def _recording_key(path: Path) -> list[Any]:
    """Start, middle and end: few bytes, since there may be a million files, but another sound differs in its middle."""
    try:
        return content_key(path, num_pieces=3)
    except OSError:  # reported when the file is read
        return [-1, ""]


def write_rejected(out: Path, rejected: Sequence[Rejected], num_items: int, skip_bad: bool) -> None:
    """With ``skip_bad`` write ``rejected.jsonl`` and print how many recordings were skipped.

    Raises :class:`KMeansError`: all were rejected, or some in an earlier run with ``skip_bad`` but not now.
    """
    if not rejected:
        return
    number, first = counted(len(rejected), "recording"), rejected[0].reason
    if skip_bad:
        atomic_write_text(out / REJECTED, "".join(json_line(asdict(item)) for item in rejected))
        print(f"{counted(len(rejected), 'bad recording')} left out, see {out / REJECTED}")
    if len(rejected) == num_items:
        raise KMeansError(f"none of {number} can be used, the first: {first}")
    if not skip_bad:
        raise KMeansError(
            f"{number} left out under --skip_bad before, the first: {first} Give --skip_bad again, or choose another "
            "output_dir."
        )
