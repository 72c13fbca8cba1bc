"""Files of requests, one JSON object per line.

A line that is no request becomes a :class:`RejectedRequest` with the reason; the others are unaffected.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.request import GenerationRequest
from speechlm_ext.utils.files.json_text import JsonLine, read_json_lines


@dataclass(frozen=True)
class RejectedRequest:
    """A line of a requests file that is no request."""

    id: str
    """The line's own id if it is unique, else ``line N``."""
    error: str
    task: str = ""
    """The line's task; empty without one."""
    data: dict[str, Any] = field(default_factory=dict)
    """The line, if it is a JSON object."""


Line = GenerationRequest | RejectedRequest


def read_requests(path: str | Path, defaults: dict[str, Any]) -> list[Line]:
    """Read a JSONL file of requests.

    Args:
        path: audio paths in it are relative to its folder.
        defaults: task, ``resample`` and sampling settings for lines that leave them out.

    Returns:
        One entry per line that is not blank, in order; ids are unique.
    """
    path = Path(path)
    lines = read_json_lines(path, "requests file", GenerationError)
    if not lines:
        raise GenerationError(f"requests file {path} holds no requests; write one JSON object per line.")
    entries: list[Line] = []
    seen: dict[str, int] = {}
    for line in lines:
        where = f"{path}, line {line.number}"
        data, entry = _read_line(line, where, defaults, path.parent)
        if entry.id in seen:
            reason = f"{where}: line {seen[entry.id]} has the id {entry.id!r} already."
            entry = RejectedRequest("", reason, data=data)
        if isinstance(entry, RejectedRequest) and not entry.id:
            name = f"line {line.number}"
            while name in seen:
                name += "'"
            entry = replace(entry, id=name)
        seen[entry.id] = line.number
        entries.append(entry)
    return entries


def _read_line(
    line: JsonLine, where: str, defaults: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Line]:
    """The line's data, and its request or the reason of its rejection, with id ``""`` if it has none of its own."""
    try:
        data = line.object()
    except ValueError as error:
        return {}, RejectedRequest("", f"{where}: {error}.")
    settings = data.get("settings")
    nested = set(settings) if isinstance(settings, dict) else set()
    for name in sorted(set(data) & nested):
        reason = f"{where}: {name!r} is given beside the other keys and under 'settings'; keep one of them."
        return data, RejectedRequest(data["id"] if isinstance(data.get("id"), str) else "", reason, data=data)
    given = set(data) | nested
    # A length in the line, absolute or relative, replaces the default's.
    for pair in ({"max_len", "max_len_ratio"}, {"min_len", "min_len_ratio"}):
        given |= pair if given & pair else set()
    full = {name: value for name, value in defaults.items() if name not in given} | data
    try:
        return data, GenerationRequest.from_dict(full, where, folder)
    except GenerationError as error:
        if "surrogate" in str(error):  # cannot be written again
            return {}, RejectedRequest("", str(error))
        name, task = (str(full[n]) if isinstance(full.get(n), str) else "" for n in ("id", "task"))
        return data, RejectedRequest(name, str(error), task, data)
