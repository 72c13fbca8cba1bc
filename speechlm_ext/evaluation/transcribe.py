"""Transcripts of the speech in records, kept on disk, so that an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from speechlm_ext.audio.files import read_audio
from speechlm_ext.errors import SpeechLMError
from speechlm_ext.evaluation.asr.scorer import SAMPLE_RATE
from speechlm_ext.evaluation.records import Record
from speechlm_ext.utils.files.io import storage_error
from speechlm_ext.utils.files.json_text import json_line, parse_json, split_lines

if TYPE_CHECKING:
    from speechlm_ext.evaluation.asr.scorer import AsrScorer

log = logging.getLogger(__name__)

#: Transcripts so far; the file is removed once the records hold them.
PARTIAL = "judge.partial.jsonl"
#: Clips transcribed in one call, after which their transcripts are stored.
BATCH_SIZE = 8
#: ``skipped`` of a record until it is transcribed.
WAITING = "not transcribed yet"


class TranscriptCache:
    """Transcripts by what they depend on: samples, language and the scorer's settings."""

    def __init__(self, out: Path, scorer: dict[str, Any]) -> None:
        self._path = out / PARTIAL
        self._scorer = json.dumps(scorer, sort_keys=True)
        self.texts: dict[str, str] = {}
        data = self._path.read_bytes() if self._path.is_file() else b""
        for _, line in split_lines(data):
            try:
                row = parse_json(line)
                self.texts[row["clip"]] = row["text"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off when a run was killed: transcribed again
        self._at_line_start = not data or data.endswith(b"\n")

    def key(self, wave: np.ndarray, lang: str) -> str:
        """The key of a clip, float32 ``[T]``."""
        digest = hashlib.sha256(f"{self._scorer}\n{lang}\n".encode("utf-8", "backslashreplace"))
        digest.update(np.ascontiguousarray(wave).tobytes())
        return digest.hexdigest()

    def add(self, key: str, text: str) -> None:
        """Store a transcript. Raises :class:`StorageError`."""
        self.texts[key] = text
        line = ("" if self._at_line_start else "\n") + json_line({"clip": key, "text": text})
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise storage_error(error, self._path) from error
        self._at_line_start = True


def transcribe_records(
    records: Sequence[Record], scorer: AsrScorer | None, no_scorer: str | None, out: Path
) -> list[Record]:
    """The records, with the transcript in each that is :data:`WAITING`, or the reason why it has none.

    Every transcript is stored at once, so that an interrupted evaluation resumes. Audio paths are relative to ``out``.
    Without a scorer the reason is ``no_scorer``. Raises :class:`StorageError`: a transcript cannot be stored.
    """
    if scorer is None:
        return [replace(r, skipped=no_scorer) if r.skipped == WAITING else r for r in records]
    done = list(records)
    todo = []
    for i, record in enumerate(records):
        if record.skipped != WAITING:
            continue
        try:
            scorer.language(record.lang)
            todo.append(i)
        except SpeechLMError as error:
            done[i] = _skip(record, error)
    todo.sort(key=lambda i: records[i].lang)
    settings = scorer.describe()
    cache = TranscriptCache(out, settings)
    with tqdm(total=len(todo), desc="ASR scorer", unit="clip", disable=None) as bar:
        for start in range(0, len(todo), BATCH_SIZE):
            batch = todo[start : start + BATCH_SIZE]
            waves, found = _read_waves({i: records[i] for i in batch}, out)
            langs = {i: records[i].lang for i in waves}
            found |= _transcribe_cached(scorer, cache, waves, langs)
            for i, text in found.items():
                if isinstance(text, Exception):
                    done[i] = _skip(records[i], text)
                else:
                    seconds = round(len(waves[i]) / SAMPLE_RATE, 3)
                    done[i] = replace(
                        records[i], hypothesis=text, skipped=None, judge=settings, seconds=seconds
                    )
            bar.update(len(batch))
    return done


def _read_waves(
    records: Mapping[int, Record], out: Path
) -> tuple[dict[int, np.ndarray], dict[int, str | Exception]]:
    """Waveforms at 16 kHz, and the errors of those that cannot be read."""
    waves: dict[int, np.ndarray] = {}
    errors: dict[int, str | Exception] = {}
    for i, record in records.items():
        try:
            waves[i] = read_audio(out / str(record.audio), SAMPLE_RATE)[0]
        except Exception as error:  # noqa: BLE001 - one bad file must not end the evaluation
            errors[i] = error
    return waves, errors


def _transcribe_cached(
    scorer: AsrScorer, cache: TranscriptCache, waves: Mapping[int, np.ndarray], langs: Mapping[int, str]
) -> dict[int, str | Exception]:
    """The transcript of each clip, from the cache if it is there; new ones are added to it."""
    keys = {i: cache.key(wave, langs[i]) for i, wave in waves.items()}
    found: dict[int, str | Exception] = {i: cache.texts[k] for i, k in keys.items() if k in cache.texts}
    new = _transcribe(scorer, {i: wave for i, wave in waves.items() if i not in found}, langs)
    for i, result in new.items():
        if isinstance(result, str):
            cache.add(keys[i], result)
    return found | new


def _transcribe(
    scorer: AsrScorer, waves: Mapping[int, np.ndarray], langs: Mapping[int, str]
) -> dict[int, str | Exception]:
    """The transcript of each clip, or the error; if a batch fails, its clips are tried one by one."""
    if not waves:
        return {}
    try:
        texts = scorer.transcribe(list(waves.values()), [langs[i] for i in waves], SAMPLE_RATE)
        return dict(zip(waves, texts, strict=True))
    except Exception as error:  # noqa: BLE001 - one bad clip must not end the evaluation
        if len(waves) == 1:
            return dict.fromkeys(waves, error)
    return {i: text for k, wave in waves.items() for i, text in _transcribe(scorer, {k: wave}, langs).items()}


def _skip(record: Record, error: Exception) -> Record:
    reason = skip_reason(error)
    log.warning("%s %r is skipped: %s", record.kind, record.id, reason)
    return replace(record, skipped=reason)


def skip_reason(error: Exception) -> str:
    """An error as the reason of a skipped item."""
    if isinstance(error, SpeechLMError):
        return str(error)
    line = next((line for line in str(error).split("\n") if line.strip()), "no message")
    return f"{type(error).__name__}: {line[:300]}"
