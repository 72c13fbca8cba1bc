"""Records: everything that a score needs, one JSON line per judged or transcribed utterance.

A record keeps the *raw* text of model or judge, where the raw ids and the audio lie, and the settings that they
came from. So a set can be scored again later, by another rule, with no model and no recogniser:
``speechlm evaluate --records records.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from speechlm_ext.errors import SpeechLMError
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.json_lines import read_json_lines
from speechlm_ext.utils.files.json_text import json_line

FILE_NAME = "records.jsonl"
VERSION = 1

#: What a record's hypothesis is: the model's transcript, or what the judge heard in generated speech, in the
#: codec's resynthesis of the recording, or in the recording itself.
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
    """Raw text of the model (``asr``) or the judge; None where there is none, and then ``skipped`` says why."""
    lang: str = "en"
    """Language tag as the manifest writes it; decides number words."""
    dataset: str = ""
    """Data set of the utterance."""
    task: str | None = None
    """Task template that produced it; None for recordings and resynthesis."""
    audio: str | None = None
    """The audio that was heard, relative to the records file."""
    ids: dict[str, Any] | None = None
    """Where the raw ids are: ``{"file": results.jsonl relative to the records file, "id": request id}``."""
    finished: str | None = None
    """How generation ended: ``eos``, ``max_len`` or ``failed``."""
    settings: dict[str, Any] | None = None
    """Sampling settings, for generated items."""
    model: dict[str, Any] | None = None
    """Path and sha256 of the model, for generated items."""
    judge: dict[str, Any] | None = None
    """The judge's settings, for items that it heard."""
    seconds: float | None = None
    """Duration of the audio that was heard."""
    skipped: str | None = None
    """Why there is no hypothesis."""
    version: int = field(default=VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically. Raises :class:`StorageError`."""
    atomic_write_text(path, "".join(json_line(r.to_dict()) for r in records))


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
