"""The results of a run as a folder: ``results.jsonl``, and ``wav/`` for speech.

A record holds everything that scoring needs later: the request, the settings with their defaults, raw ids and their
log-probabilities, text or audio path, how it ended, and which model made it. While a run is going on, records are
appended to ``results.partial.jsonl``; at its end ``results.jsonl`` is written whole, in the order of the requests. A
run that was stopped goes on where it was: a request is done when a record of the same request and model exists and did
not fail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.audio import write_wav
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.request import GenerationRequest, GenerationResult
from speechlm_ext.utils.io import atomic_write_text, storage_error

RESULTS = "results.jsonl"
PARTIAL = "results.partial.jsonl"
VERSION = 1


def request_dict(request: GenerationRequest) -> dict[str, Any]:
    """A request as plain data; waveforms given as arrays are named by their hash."""

    def source(value: str | Path | np.ndarray | None) -> str | None:
        if isinstance(value, np.ndarray):
            return "array:" + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return None if value is None else str(value)

    return {
        "id": request.id,
        "task": request.task,
        "text": request.text,
        "audio": source(request.audio),
        "speaker_prompt": source(request.speaker_prompt),
        "lang": request.lang,
        "settings": dataclasses.asdict(request.settings),
    }


def fingerprint(request: GenerationRequest, model_hash: str) -> str:
    """sha256 of a request and the model that serves it; equal ones give equal tokens."""
    data: dict[str, Any] = {"request": request_dict(request), "model": model_hash}
    for name in ("audio", "speaker_prompt"):
        value = getattr(request, name)
        if isinstance(value, (str, Path)) and os.path.exists(value):
            data[name] = os.path.getsize(value)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_stem(request_id: str) -> str:
    """A file name for an id: the id itself where it can be one, else a readable part and a hash."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", request_id).lstrip(".")[:100]
    if stem == request_id:
        return stem
    return f"{stem}-{hashlib.sha256(request_id.encode()).hexdigest()[:8]}"


class ResultsFolder:
    """Writes records as they come, and knows which requests are done.

    Args:
        folder: made if missing.
        model_path: for the records.
        model_hash: sha256 of the weights.

    Raises:
        GenerationError: an existing record file is not one of ours.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, model_path: str | Path, model_hash: str) -> None:
        self.folder = Path(folder)
        self.model = {"path": str(model_path), "sha256": model_hash}
        self.records: dict[str, dict[str, Any]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder / RESULTS) from error
        self.records.update(_read(self.folder / RESULTS, partial=False))
        self.records.update(_read(self.folder / PARTIAL, partial=True))

    def is_done(self, request: GenerationRequest) -> bool:
        """Whether this request was served by this model already, without failing, and its audio is there."""
        record = self.records.get(request.id)
        if record is None or record.get("finished") == "failed":
            return False
        if record.get("fingerprint") != fingerprint(request, self.model["sha256"]):
            return False
        return record.get("audio") is None or (self.folder / record["audio"]).is_file()

    def add(self, request: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
        """Write a result's audio and append its record.

        Raises:
            StorageError: the disk is full; what was written before is intact and the run can be resumed.
        """
        audio = None
        if result.wav is not None and result.wav.size and result.sample_rate:
            audio = f"wav/{file_stem(result.id)}.wav"
            write_wav(self.folder / audio, result.wav, result.sample_rate)
        record = {
            "version": VERSION,
            "id": result.id,
            "task": result.task,
            "finished": result.finished,
            "modality": result.modality,
            "text": result.text,
            "audio": audio,
            "sample_rate": result.sample_rate,
            "ids": None if result.ids is None else result.ids.tolist(),
            "num_given": result.num_given,
            "chain": [ids.tolist() for ids in result.chain],
            "logprob": result.logprob,
            "num_scored": result.num_scored,
            "logprobs": None if result.logprobs is None else _rounded(result.logprobs),
            "end_logprob": result.end_logprob,
            "tries": list(result.tries),
            "seconds": round(result.seconds, 3),
            "settings": None if result.settings is None else dataclasses.asdict(result.settings),
            "error": result.error,
            "request": request_dict(request),
            "model": self.model,
            "fingerprint": fingerprint(request, self.model["sha256"]),
        }
        path = self.folder / PARTIAL
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, path) from error
        self.records[result.id] = record
        return record

    def close(self, requests: Sequence[GenerationRequest]) -> Path:
        """Write ``results.jsonl`` with the records of ``requests`` in their order; drop the partial file."""
        lines = [json.dumps(self.records[r.id], ensure_ascii=False) for r in requests]
        atomic_write_text(self.folder / RESULTS, "".join(line + "\n" for line in lines))
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return self.folder / RESULTS


def _rounded(logprobs_TC: np.ndarray) -> list[list[float | None]]:
    """Log-probabilities with five decimals; None where there is none, which JSON can say."""
    return [[None if np.isnan(x) else round(float(x), 5) for x in row] for row in logprobs_TC]


def _read(path: Path, partial: bool) -> dict[str, dict[str, Any]]:
    """Records by id; the last line of a partial file may be cut off and is then dropped from the file too."""
    if not path.is_file():
        return {}
    records: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError):
            if partial and number == len(lines):
                # The process was stopped while it wrote this line.
                os.truncate(path, path.stat().st_size - len(line))
                break
            raise GenerationError(
                f"{path}, line {number}: not a generation record; choose another folder or remove the file."
            ) from None
    return records
