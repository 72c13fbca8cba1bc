"""What the judge has heard so far, kept on disk, so that an interrupted evaluation resumes without hearing it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.utils.files.io import storage_error
from speechlm_ext.utils.files.json_text import json_line, parse_json, split_lines

PARTIAL = "judge.partial.jsonl"


class HeardClips:
    """Texts by what they depend on: samples, language, and the judge's settings.

    Args:
        out: folder of the evaluation; :data:`PARTIAL` in it is read and lengthened.
        judge: the judge's settings as plain data.
    """

    def __init__(self, out: Path, judge: dict[str, Any]) -> None:
        self._path = out / PARTIAL
        self._judge = json.dumps(judge, sort_keys=True)
        self._texts: dict[str, str] = {}
        data = self._path.read_bytes() if self._path.is_file() else b""
        for _, line in split_lines(data):
            try:
                row = parse_json(line)
                self._texts[row["clip"]] = row["text"]
            except (ValueError, KeyError, TypeError):
                continue  # cut where a run was killed: heard again
        self._begun = not data or data.endswith(b"\n")

    def key(self, wave: np.ndarray, lang: str) -> str:
        """The name of a clip, float32 ``[T]``, for this judge."""
        digest = hashlib.sha256(f"{self._judge}\n{lang}\n".encode("utf-8", "backslashreplace"))
        digest.update(np.ascontiguousarray(wave).tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> str | None:
        """The text of a clip that was heard before."""
        return self._texts.get(key)

    def add(self, key: str, text: str) -> None:
        """Keep the text of a clip. Raises :class:`StorageError`."""
        self._texts[key] = text
        line = ("" if self._begun else "\n") + json_line({"clip": key, "text": text})
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise storage_error(error, self._path) from error
        self._begun = True


def forget(out: Path) -> None:
    """Remove what was kept; the records have it."""
    (out / PARTIAL).unlink(missing_ok=True)
