"""Records: everything that a score needs, one JSON line per scored item.

A record holds the *raw* text of the model or the ASR scorer, the paths of raw ids and audio, and the settings that
produced them. A set can be scored again by another rule, without a model or an ASR model:
``speechlm evaluate --records records.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.json_text import json_line, read_json_lines

FILE_NAME = "records.jsonl"
VERSION = 1

#: Source of a record's hypothesis: the model's transcript, or the ASR scorer's transcript of generated speech, of the
#: codec's resynthesis of the recording, or of the recording itself.
KINDS = ("asr", "tts", "codec", "recording")


class RecordError(SpeechLMError):
    """A records file is missing, empty or malformed."""


@dataclass(frozen=True)
class Record:
    """One scored item."""

    id: str
    """The utterance's id."""
    kind: str
    """One of :data:`KINDS`."""
    reference: str
    """Raw reference text."""
    hypothesis: str | None
    """Raw text of the model (``asr``) or the ASR scorer; None if there is none: ``skipped`` has the reason."""
    lang: str = "en"
    """Language tag as in the manifest; selects the number words."""
    dataset: str = ""
    """Data set of the utterance."""
    task: str | None = None
    """Task template that produced it; None for recordings and resynthesis."""
    audio: str | None = None
    """The transcribed audio, relative to the records file."""
    ids: dict[str, Any] | None = None
    """Place of the raw ids: ``{"file": results.jsonl relative to the records file, "id": request id}``."""
    finished: str | None = None
    """How generation ended: ``eos``, ``max_len`` or ``failed``."""
    settings: dict[str, Any] | None = None
    """Sampling settings, for generated items."""
    model: dict[str, Any] | None = None
    """Path and sha256 of the model, for generated items."""
    judge: dict[str, Any] | None = None
    """The ASR scorer's settings, for items that it transcribed."""
    seconds: float | None = None
    """Duration of the transcribed audio."""
    skipped: str | None = None
    """Why there is no hypothesis."""
    version: int = field(default=VERSION)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically. Raises :class:`StorageError`."""
    atomic_write_text(path, "".join(json_line(asdict(r)) for r in records))


def read_records(path: str | Path) -> list[Record]:
    """Read a records file, or the one in a folder.

    Raises:
        RecordError: it is missing or empty, or a line is not a record; the message names the line.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    names = {f.name for f in fields(Record)}
    records = []
    for where, data in read_jsonl(path, "records file"):
        if not isinstance(data, dict) or not {"id", "kind", "reference", "hypothesis"} <= set(data):
            raise RecordError(f"{where}: not a record; expected at least id, kind, reference and hypothesis.")
        if data["kind"] not in KINDS or set(data) - names:
            raise RecordError(
                f"{where}: kind must be one of {KINDS} and keys among {sorted(names)}, got kind {data['kind']!r} "
                f"and unknown keys {sorted(set(data) - names)}."
            )
        record = Record(**data)
        _check_types(record, where)
        if record.hypothesis is None and not record.skipped:
            raise RecordError(
                f"{where}: item {record.id!r} has neither a hypothesis nor a reason in 'skipped'."
            )
        records.append(record)
    return records


def _check_types(record: Record, where: str) -> None:
    for name in ("id", "reference", "lang", "dataset"):
        value = getattr(record, name)
        if not isinstance(value, str):
            raise RecordError(f"{where}: {name!r} must be a string, got {value!r}.")
    for name in ("hypothesis", "skipped", "finished", "task"):
        value = getattr(record, name)
        if value is not None and not isinstance(value, str):
            raise RecordError(f"{where}: {name!r} must be a string or null, got {value!r}.")


def read_jsonl(path: Path, what: str) -> list[tuple[str, Any]]:
    """``(file:line, value)`` of each line. Raises :class:`RecordError` naming the line, or if there is none."""
    rows = []
    for line in read_json_lines(path, what, RecordError):
        try:
            rows.append((line.where, line.value()))
        except ValueError as error:
            raise RecordError(f"{line.where}: {error}.") from None
    if not rows:
        raise RecordError(f"{what} {path} holds no lines; there is nothing to score.")
    return rows
