"""The results of a run as a folder: ``results.jsonl``, and ``wav/`` for speech.

A record holds everything that scoring needs later: the request, the settings with their defaults, raw ids and their
log-probabilities, text or audio path, how it ended, and the model. During a run, records are appended to
``results.partial.jsonl``; at its end ``results.jsonl`` is written whole, in the order of the requests. An interrupted
run resumes: a request is done if a record of the same request and model exists and did not fail. One run at a time
writes into a folder, and a run with fewer requests keeps the results of an earlier one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.audio.files import write_wav
from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.request import RECORDINGS, GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.request_file import RejectedRequest
from speechlm_ext.utils.files.io import atomic_write_text, sha256_file, sha256_json, storage_error
from speechlm_ext.utils.files.json_shape import check_shape
from speechlm_ext.utils.files.json_text import json_line, json_lines
from speechlm_ext.utils.names import file_name

RESULTS = "results.jsonl"
PARTIAL = "results.partial.jsonl"
VERSION = 1


def request_dict(request: GenerationRequest) -> dict[str, Any]:
    """A request as plain data, in which a hash stands for a waveform array."""

    def source(value: str | Path | np.ndarray | None) -> str | None:
        if isinstance(value, np.ndarray):
            # With the type: the same bytes are other samples in another type.
            digest = hashlib.sha256(f"{value.dtype.str} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
            return "array:" + digest.hexdigest()
        return None if value is None else str(value)

    return {
        "id": request.id,
        "task": request.task,
        "text": request.text,
        **{name: source(getattr(request, name)) for name in RECORDINGS},
        "target_text": request.target_text,
        "lang": request.lang,
        "resample": request.resample,
        "settings": dataclasses.asdict(request.settings),
    }


def fingerprint(request: GenerationRequest, model: dict[str, str]) -> str:
    """sha256 of a request and its model; equal ones give equal tokens."""
    data: dict[str, Any] = {"request": request_dict(request), "model": model}
    for name in RECORDINGS:
        value = getattr(request, name)
        if isinstance(value, np.ndarray) and request.audio_rate is not None:
            data["audio_rate"] = request.audio_rate
        if isinstance(value, (str, Path)) and os.path.isfile(value):
            # By content: recordings of equal length have equal sizes.
            with contextlib.suppress(OSError):
                data[name] = sha256_file(value)
    return sha256_json(data)


class ResultsFolder:
    """Writes records as requests end, and knows the requests that are done.

    Args:
        folder: created if missing; locked until :meth:`release`, or the end of the process.
        model_path: for the records.
        model_hash: sha256 of the weights.
        identity: the layout's hash and the dtype, on which tokens depend as well.

    Raises:
        GenerationError: an existing record file is not one of ours, or another run writes into the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, model_path: str | Path, model_hash: str, **identity: str) -> None:
        self.folder = Path(folder)
        self.model = {"path": str(model_path), "sha256": model_hash, **identity}
        self.records: dict[str, dict[str, Any]] = {}
        self._identity = {"sha256": model_hash, **identity}
        self._fingerprints: dict[str, str] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise storage_error(error, self.folder / RESULTS) from error
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GenerationError(
                    f"another run is writing into {folder}; wait for it, or use another folder."
                ) from None
            except OSError:  # a file system without locks
                pass
            # A killed run leaves the temporary file that it was writing.
            for path in (*self.folder.glob(f".{RESULTS}.*"), *self.folder.glob("wav/.*.wav")):
                path.unlink(missing_ok=True)
            self.records.update(_read(self.folder / RESULTS, partial=False))
            self.records.update(_read(self.folder / PARTIAL, partial=True))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other runs write into the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def is_done(self, request: GenerationRequest) -> bool:
        """Whether a result of this request and model exists, has not failed, and has its audio."""
        record = self.records.get(request.id)
        if record is None or record.get("finished") == "failed":
            return False
        if record.get("fingerprint") != self._fingerprint(request):
            # A result without conversion is also that of a request that allows it: none was needed.
            plain = dataclasses.replace(request, resample=False)
            if not request.resample or record.get("fingerprint") != fingerprint(plain, self._identity):
                return False
        paths = [one.get("audio") for one in (record, *record.get("alternatives", []))]
        return all(path is None or (self.folder / path).is_file() for path in paths)

    def _fingerprint(self, request: GenerationRequest) -> str:
        """Fingerprint of a request, cached: its recordings are read once."""
        if request.id not in self._fingerprints:
            self._fingerprints[request.id] = fingerprint(request, self._identity)
        return self._fingerprints[request.id]

    def add(self, request: GenerationRequest, result: GenerationResult) -> None:
        """Write a result's audio and append its record.

        On a full disk what was written before is intact, and the run can be resumed.
        """
        alternatives = [
            self._outcome(one, result.id, number) for number, one in enumerate(result.alternatives, 2)
        ]
        outcome = self._outcome(result, result.id) | ({"alternatives": alternatives} if alternatives else {})
        record = self._record(result, outcome, request_dict(request), self._fingerprint(request))
        path = self.folder / PARTIAL
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(_lines([record]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, path) from error
        self.records[result.id] = record

    def _outcome(self, result: GenerationResult, request_id: str, number: int = 1) -> dict[str, Any]:
        """The fields of a request's ``number``-th result; writes its audio to ``wav/``."""
        audio = None
        if result.wav is not None and result.wav.size and result.sample_rate:
            audio = f"wav/{file_name(request_id, '.wav', number=number)}"
            write_wav(self.folder / audio, result.wav, result.sample_rate)
        return {
            "finished": result.finished,
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
            "tries": [x if math.isfinite(x) else None for x in result.tries],
            "seconds": round(result.seconds, 3),
            "settings": None if result.settings is None else dataclasses.asdict(result.settings),
            "error": result.error,
        }

    def add_rejected(self, rejected: RejectedRequest) -> None:
        """Keep the record of a line that is no request. It is not written before :meth:`close`."""
        result = GenerationResult(rejected.id, rejected.task, "failed", error=rejected.error)
        request: dict[str, Any] = {"id": rejected.id, "task": rejected.task}
        request |= {name: rejected.data.get(name) for name in ("audio", "text", "lang")}
        self.records[rejected.id] = self._record(result, self._outcome(result, ""), request, None)

    def _record(
        self,
        result: GenerationResult,
        outcome: dict[str, Any],
        request: dict[str, Any],
        fingerprint: str | None,
    ) -> dict[str, Any]:
        head = {"version": VERSION, "id": result.id, "task": result.task, "modality": result.modality}
        return head | outcome | {"request": request, "model": self.model, "fingerprint": fingerprint}

    def close(self, requests: Sequence[GenerationRequest | RejectedRequest]) -> Path:
        """Write ``results.jsonl`` with the records of ``requests`` in their order.

        Results of other requests, of an earlier run with more of them, stay in the partial file, so that they need not
        be decoded again; without any it is removed.
        """
        wanted = {r.id for r in requests}
        decoded = {name: record for name, record in self.records.items() if record.get("fingerprint")}
        others = [record for name, record in decoded.items() if name not in wanted]
        if others:  # nothing may be lost between the two writes
            atomic_write_text(self.folder / PARTIAL, _lines(decoded.values()))
        atomic_write_text(self.folder / RESULTS, _lines(self.records[r.id] for r in requests))
        if others:
            atomic_write_text(self.folder / PARTIAL, _lines(others))
        else:
            (self.folder / PARTIAL).unlink(missing_ok=True)
        return self.folder / RESULTS


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(map(json_line, records))


def _rounded(logprobs_TC: np.ndarray) -> list[list[float | None]]:
    """Log-probabilities with five decimals, and None for NaN, which JSON lacks."""
    return [[None if np.isnan(x) else round(float(x), 5) for x in row] for row in logprobs_TC]


_OUTCOME = {"finished?": str, "audio?": str | None, "...": Any}
#: The fields of a record that this module reads.
_RECORD = {**_OUTCOME, "id": str, "fingerprint?": str | None, "alternatives?": [_OUTCOME]}


def _read(path: Path, partial: bool) -> dict[str, dict[str, Any]]:
    """Records by id. A partial file is truncated to its last complete line, since a killed run may leave a part of one
    and the next record must start a new line."""
    if not path.is_file():
        return {}
    records: dict[str, dict[str, Any]] = {}
    data = path.read_bytes()
    if partial and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        os.truncate(path, len(data))
    for line in json_lines(path, data):
        try:
            record = line.value()
            check_shape(record, _RECORD)
            records[record["id"]] = record
        except ValueError as problem:
            raise GenerationError(
                f"{path}, line {line.number}: not a generation record: {problem}; use another folder or delete it."
            ) from None
    return records
