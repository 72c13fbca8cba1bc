"""Transcripts so far, kept on disk, so that an interrupted evaluation resumes without transcribing them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.utils.files.io import storage_error
from speechlm_ext.utils.files.json_text import json_line, parse_json, split_lines

PARTIAL = "judge.partial.jsonl"


class TranscriptCache:
    """Transcripts by what they depend on: samples, language and the scorer's settings.

    Args:
        out: folder of the evaluation; :data:`PARTIAL` in it is read and appended to.
        scorer: the scorer's settings as plain data.
    """

    def __init__(self, out: Path, scorer: dict[str, Any]) -> None:
        self._path = out / PARTIAL
        self._scorer = json.dumps(scorer, sort_keys=True)
        self._texts: dict[str, str] = {}
        data = self._path.read_bytes() if self._path.is_file() else b""
        for _, line in split_lines(data):
            try:
                row = parse_json(line)
                self._texts[row["clip"]] = row["text"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off when a run was killed: transcribed again
        self._at_line_start = not data or data.endswith(b"\n")

    def key(self, wave: np.ndarray, lang: str) -> str:
        """The key of a clip, float32 ``[T]``."""
        digest = hashlib.sha256(f"{self._scorer}\n{lang}\n".encode("utf-8", "backslashreplace"))
        digest.update(np.ascontiguousarray(wave).tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> str | None:
        """The transcript under ``key``, or None."""
        return self._texts.get(key)

    def add(self, key: str, text: str) -> None:
        """Store a transcript. Raises :class:`StorageError`."""
        self._texts[key] = text
        line = ("" if self._at_line_start else "\n") + json_line({"clip": key, "text": text})
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise storage_error(error, self._path) from error
        self._at_line_start = True


def remove_partial(out: Path) -> None:
    """Remove the stored transcripts, once the records hold them."""
    (out / PARTIAL).unlink(missing_ok=True)
