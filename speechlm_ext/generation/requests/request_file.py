"""Files of requests: JSON lines, of which a bad one stops no other.

A line that is no request becomes a :class:`RefusedRequest` with the reason; the others are served.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.request import GenerationRequest
from speechlm_ext.utils.files.json_lines import JsonLine, read_json_lines


@dataclass(frozen=True)
class RefusedRequest:
    """A line of a requests file that cannot be served."""

    id: str
    """The line's own id if it has one that is free, else ``line N``."""
    error: str
    task: str = ""
    """What the line asked for; empty if it does not say."""
    data: dict[str, Any] = field(default_factory=dict)
    """The line, if it is a JSON object."""


#: What may come of a line.
Line = GenerationRequest | RefusedRequest


def read_requests(path: str | Path, defaults: dict[str, Any]) -> list[Line]:
    """Read a JSONL file of requests.

    Args:
        path: audio paths in it are relative to its folder.
        defaults: task, ``resample`` and sampling settings for lines that leave them out.

    Returns:
        One entry per line that is not blank, in order; no id comes twice.

    Raises:
        GenerationError: the file is missing, empty or not UTF-8.
    """
    path = Path(path)
    lines = read_json_lines(path, "requests file", GenerationError)
    if not lines:
        raise GenerationError(f"requests file {path} holds no requests; write one JSON object per line.")
    entries: list[Line] = []
    seen: dict[str, int] = {}
    for line in lines:
        where, number = f"{path}, line {line.number}", line.number
        found, entry = _read_line(line, where, defaults, path.parent)
        if entry.id in seen:
            again = f"{where}: id {entry.id!r} stands on line {seen[entry.id]} already."
            entry = RefusedRequest("", again, data=found)
        if not entry.id:
            entry = RefusedRequest(_free(f"line {number}", seen), entry.error, data=found)  # type: ignore[union-attr]
        seen[entry.id] = number
        entries.append(entry)
    return entries


def _read_line(
    line: JsonLine, where: str, defaults: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Line]:
    """The line's data, and the request or what is wrong with it; id ``""`` if it has none of its own."""
    try:
        data = line.object()
    except ValueError as error:
        return {}, RefusedRequest("", f"{where}: {error}.")
    nested = data.get("settings")
    twice = sorted(set(data) & set(nested)) if isinstance(nested, dict) else []
    if twice:
        reason = (
            f"{where}: {twice[0]!r} is given beside the other keys and under 'settings'; keep one of them."
        )
        return data, RefusedRequest(data["id"] if isinstance(data.get("id"), str) else "", reason, data=data)
    mine = set(data) | (set(nested) if isinstance(nested, dict) else set())
    # A length of the line's own takes the place of the default's, absolute or relative.
    for pair in ({"max_len", "max_len_ratio"}, {"min_len", "min_len_ratio"}):
        mine |= pair if mine & pair else set()
    full = {name: value for name, value in defaults.items() if name not in mine} | data
    try:
        return data, GenerationRequest.from_dict(full, where, folder)
    except GenerationError as error:
        if "surrogate" in str(error):  # cannot be written again
            return {}, RefusedRequest("", str(error))
        name, task = (str(full[n]) if isinstance(full.get(n), str) else "" for n in ("id", "task"))
        return data, RefusedRequest(name, str(error), task, data)


def _free(name: str, seen: dict[str, int]) -> str:
    while name in seen:
        name += "'"
    return name
