"""Manifests: one JSON object per line, one utterance per object.

Known keys are ``id``, ``audio``, ``text``, ``speaker``, ``lang``, ``dataset``, ``start`` and ``duration``; a line
needs an ``id`` and at least one of ``audio`` and ``text``. Audio paths are relative to the manifest's own folder,
so a folder of recordings can be moved as a whole. Other keys are ignored but counted, so that a misspelt ``speakr``
is noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm_ext.errors import ConfigError, ManifestError
from speechlm_ext.utils.files.json_text import JsonLine, read_json_lines

KEYS = ("id", "audio", "text", "speaker", "lang", "dataset", "start", "duration")


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest."""

    id: str
    """Unique in its data set."""
    audio: Path | None = None
    """Absolute path of the recording, or None for text alone."""
    text: str | None = None
    """Transcript or plain text, or None for audio alone."""
    speaker: str | None = None
    """Who speaks; speaker prompts are drawn from utterances with the same one."""
    lang: str | None = None
    """Language code, free of choice."""
    dataset: str = ""
    """Name of the data set; default the manifest's file name without its ending."""
    start: float | None = None
    """Start of the utterance in the recording, in seconds; without it the whole recording is the utterance."""
    duration: float | None = None
    """Duration from ``start``, in seconds; default to the recording's end. Not used without ``start``."""
    line: int = 0
    """Line number in the manifest, from 1."""
    manifest: str = ""
    """Path of the manifest, for messages."""

    @property
    def where(self) -> str:
        """``file:line`` and id, for messages."""
        return f"{self.manifest}:{self.line}: utterance {self.id!r}"


@dataclass(frozen=True)
class Rejected:
    """An item that was left out, with the reason."""

    id: str | None
    """The item's id where it could be read."""
    manifest: str
    line: int
    reason: str


@dataclass
class Manifest:
    """The lines of one or several manifests."""

    utterances: list[Utterance] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    """Number of lines with each unknown key."""

    def require_good(self) -> None:
        """Raise :class:`ManifestError` for the first rejected line."""
        for item in self.rejected:
            raise ManifestError(f"{item.manifest}:{item.line}: {item.reason}")


def read_manifest(path: str | Path, *, check_audio: bool = True) -> list[Utterance]:
    """Read a manifest in which every line must be good.

    Args:
        path: a UTF-8 file with one JSON object per line; blank lines are skipped.
        check_audio: also require that every audio file exists.

    Returns:
        The utterances in the file's order.

    Raises:
        ManifestError: the file is missing or empty, or a line is not good; the message names file and line.
    """
    manifest = scan_manifest(path, check_audio=check_audio)
    manifest.require_good()
    return manifest.utterances


def read_manifests(paths: Sequence[str], *, skip_bad: bool) -> Manifest:
    """Read several manifests; ids must be unique within a data set.

    Args:
        skip_bad: collect bad lines in ``rejected`` instead of raising.

    Raises:
        ConfigError: no manifest. ManifestError: one cannot be read, or the first bad line, or every line is bad.
    """
    if not paths:
        raise ConfigError("no manifest was given; name at least one with --manifest.")
    whole = Manifest()
    seen: dict[tuple[str, str], Utterance] = {}
    for path in paths:
        manifest = scan_manifest(path)
        if not skip_bad:
            manifest.require_good()
        whole.rejected += manifest.rejected
        whole.unknown_keys += manifest.unknown_keys
        for utterance in manifest.utterances:
            first = seen.setdefault((utterance.dataset, utterance.id), utterance)
            if first is utterance:
                whole.utterances.append(utterance)
                continue
            reason = (
                f"id {utterance.id!r} of data set {utterance.dataset!r} is already at {first.manifest}:{first.line}; "
                "ids must be unique in a data set. Rename one, or give the lines another 'dataset'."
            )
            whole.rejected.append(Rejected(utterance.id, utterance.manifest, utterance.line, reason))
        if not skip_bad:
            whole.require_good()
    if not whole.utterances:
        raise ManifestError(
            f"every one of {len(whole.rejected)} lines is bad, the first: {whole.rejected[0].reason}"
        )
    return whole


def scan_manifest(path: str | Path, *, check_audio: bool = True) -> Manifest:
    """Read a manifest and collect its bad lines beside the good ones.

    Raises:
        ManifestError: the file is missing or has no line at all; bad lines raise nothing.
    """
    path = Path(path)
    lines = read_json_lines(path, "manifest", ManifestError, all_utf8=False)
    if not lines:
        raise ManifestError(
            f"manifest {path} is empty; expected one JSON object per line, e.g. "
            '{"id": "a1", "audio": "a1.wav", "text": "hello"}.'
        )
    manifest = Manifest()
    first_line: dict[str, int] = {}
    for line in lines:
        row_id: str | None = None
        try:
            row = _parse(line)
            row_id = _text(row, "id", number_too=True)
            if row_id is None:
                raise ManifestError("no 'id'; every line needs an id that is unique in its manifest.")
            if row_id in first_line:
                raise ManifestError(
                    f"id {row_id!r} is already in line {first_line[row_id]}; ids must be unique."
                )
            manifest.utterances.append(_utterance(row, row_id, line, check_audio))
        except ManifestError as error:
            manifest.rejected.append(Rejected(row_id, str(path), line.number, str(error)))
            continue
        first_line[row_id] = line.number
        manifest.unknown_keys.update(k for k in row if k not in KEYS)
    return manifest


def _parse(line: JsonLine) -> dict[str, Any]:
    try:
        return line.object()
    except ValueError as error:
        raise ManifestError(f"{error}; every line is one JSON object in UTF-8.") from None


def _text(row: dict[str, Any], key: str, number_too: bool = False) -> str | None:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and number_too:
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(
            f"{key!r} must be a string that is not blank, got {value!r}; fix it or leave the key out."
        )
    return value


def _seconds(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not good or (key == "duration" and value == 0):
        raise ManifestError(
            f"{key!r} must be a number of seconds, {'> 0' if key == 'duration' else '>= 0'}, got {value!r}."
        )
    return float(value)


def _utterance(row: dict[str, Any], row_id: str, line: JsonLine, check_audio: bool) -> Utterance:
    audio, text = _text(row, "audio"), _text(row, "text")
    if audio is None and text is None:
        raise ManifestError(
            f"utterance {row_id!r} has neither 'audio' nor 'text'; it needs one of them or both."
        )
    try:
        # JSON can hold lone surrogates, which no file and no tokenizer takes.
        "".join(v for v in row.values() if isinstance(v, str)).encode("utf-8")
    except UnicodeEncodeError:
        raise ManifestError(
            f"utterance {row_id!r} holds a lone surrogate, which is not Unicode text; fix it."
        ) from None
    file = None if audio is None else line.path.absolute().parent / audio
    if file is not None and check_audio and not file.is_file():
        raise ManifestError(
            f"utterance {row_id!r}: audio file {file} does not exist; paths are relative to the manifest's folder."
        )
    return Utterance(
        id=row_id,
        audio=file,
        text=text,
        speaker=_text(row, "speaker", number_too=True),
        lang=_text(row, "lang"),
        dataset=_text(row, "dataset") or line.path.stem,
        start=_seconds(row, "start"),
        duration=_seconds(row, "duration"),
        line=line.number,
        manifest=str(line.path),
    )
