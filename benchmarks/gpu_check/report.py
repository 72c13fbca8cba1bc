"""What a check found: a line of JSON for each row as it comes, and the reports that are made from those lines alone.

``report.jsonl`` holds a line ``run`` for each run (device, commit, planned parts), and for each part a line ``begin``,
its rows and a line ``end``; a run that was cut off lacks the last ones. :func:`read_runs` gives the runs of such files,
:func:`as_markdown` the report of the newest commit, :func:`add_to_history` the file of a device with all its runs.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speechlm_ext.utils.files.io import atomic_write_json, make_folder
from speechlm_ext.utils.files.json_text import parse_json

Run = dict[str, Any]


class Recorder:
    """Appends lines to ``report.jsonl``; each is on disk when its call returns."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path, self._lock = path, threading.Lock()
        # A run that was killed may have left half a line.
        self._needs_newline = (
            path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        )

    def write(self, kind: str, **entries: Any) -> None:
        """Append one line."""
        line = json.dumps({"kind": kind, **entries}, default=str)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._needs_newline + line + "\n")
            self._needs_newline = False
            file.flush()
            os.fsync(file.fileno())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs of some ``report.jsonl`` files, oldest first.

    Each has the entries of its line ``run`` and ``parts``: name -> ``status``, ``seconds``, ``note``, ``rows``. A part
    without its end is ``cut off``, a planned one without its begin ``not reached``. Lines that cannot be read are
    counted under ``unreadable``.

    Raises:
        ValueError: a file cannot be read, or has no run.
    """
    runs: list[Run] = []
    for path in paths:
        try:
            lines = Path(path).read_text("utf-8", errors="replace").splitlines()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error}).") from None
        before = len(runs)
        unreadable = 0
        for line in lines:
            try:
                entry = json.loads(line)
                kind = entry.pop("kind")
                if kind == "run":
                    planned = {
                        p: {"status": "not reached", "seconds": 0, "note": "", "rows": []}
                        for p in entry["parts"]
                    }
                    runs.append({**entry, "parts": planned, "unreadable": 0})
                elif len(runs) > before:
                    _add(runs[-1]["parts"], kind, entry)
                else:
                    unreadable += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                if len(runs) > before:
                    runs[-1]["unreadable"] += 1
                else:
                    unreadable += 1
        if len(runs) == before:
            raise ValueError(
                f"{path}: no run of a GPU check is in it ({unreadable} lines that are none of one)."
            )
        runs[before]["unreadable"] += unreadable
    return sorted(runs, key=lambda run: run["started"])


def _add(parts: dict[str, Any], kind: str, entry: dict[str, Any]) -> None:
    part = parts[entry.pop("part")]
    if kind == "begin":
        part["status"] = "cut off"
    elif kind == "row":
        part["rows"].append(entry)
    elif kind == "end":
        part.update(entry)


def history_path(folder: Path, device: str) -> Path:
    """The file of a device's runs."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def add_to_history(runs: list[Run], folder: Path) -> list[Path]:
    """Put runs into ``<device>.json`` of ``folder``, beside those that are there; a run that is there is replaced.

    Raises:
        ValueError: a file there is no history; it is left as it is.
        StorageError: a file cannot be written.
    """
    paths = []
    make_folder(folder)
    for device in dict.fromkeys(run["device"] for run in runs):
        path, known = history_path(folder, device), list[Run]()
        if path.is_file():
            data = parse_json(path.read_bytes())
            if not isinstance(data, dict) or not isinstance(data.get("runs"), list):
                raise ValueError(f"{path}: not the history of a device; move it away.")
            known = data["runs"]
        merged = {run["started"]: run for run in [*known, *(run for run in runs if run["device"] == device)]}
        atomic_write_json(path, {"device": device, "runs": [merged[key] for key in sorted(merged)]})
        paths.append(path)
    return paths


def as_markdown(runs: list[Run]) -> str:
    """The report of the newest run and of those before it with the same commit and device.

    A part comes from the newest of them that began it.
    """
    newest = runs[-1]
    same = [run for run in runs if (run["commit"], run["device"]) == (newest["commit"], newest["device"])]
    parts: dict[str, tuple[Run, dict[str, Any]]] = {}
    for run in same:
        for name, part in run["parts"].items():
            if name not in parts or part["status"] != "not reached":
                parts[name] = run, part
    machine = newest["machine"]
    lines = [f"# {newest['device']}{' (dry run)' if newest['dry_run'] else ''}", ""]
    lines += [
        f"Commit {newest['commit']}; {newest['started']}; "
        + ", ".join(f"{k} {v}" for k, v in machine.items())
    ]
    lines += ["", "| part | result | seconds | rows | |", "|---|---|---|---|---|"]
    for name, (run, part) in parts.items():
        note = _cell(part["note"]) + ("" if run is newest else f" (run of {run['started']})")
        lines.append(
            f"| {name} | {part['status']} | {part['seconds']:g} | {len(part['rows'])} | {note.strip()} |"
        )
    if unreadable := sum(run["unreadable"] for run in same):
        lines += ["", f"{unreadable} lines of the record cannot be read; what they said is not here."]
    rows = {name: part["rows"] for name, (_, part) in parts.items()}
    ops = [row for name in ("kernels", "bench") for row in rows.pop(name, [])]
    lines += _op_tables(ops)
    for name, found in rows.items():
        if found:
            lines += ["", f"**{name}**", "", *_plain_table(found)]
    for name, (_, part) in parts.items():
        if part["status"] in ("failed", "timeout") and part.get("output"):
            lines += ["", f"Last output of {name}:", "", "```", *part["output"][-20:], "```"]
    return "\n".join(lines) + "\n"


def _op_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Ops beside their limit and rivals, and the rows that failed."""
    lines: list[str] = []
    good = [row for row in rows if "seconds" in row]
    for op in dict.fromkeys(row["op"] for row in good):
        lines += [
            "",
            f"**{op}**",
            "",
            "| shape | us | of the limit | rival time ÷ ours | spread | MiB beside inputs and results |",
            "|---|---|---|---|---|---|",
        ]
        for row in good:
            if row["op"] == op:
                ratios = ", ".join(
                    f"{name} {ratio:.3g}" for name, ratio in sorted(row.get("ratios", {}).items())
                )
                ratios += "".join(f"; {name} failed" for name in row.get("rival_errors", {}))
                ratios += "".join(f"; {_cell(reason)}" for reason in row.get("rivals_skipped", []))
                share = "" if row.get("limit_fraction") is None else f"{row['limit_fraction']:.0%}"
                if "limit_tflop_per_s" in row:
                    share += f" ({row['tflop_per_s']:.0f} of {row['limit_tflop_per_s']:.0f} TFLOP/s)"
                memory = row.get("peak_bytes")
                cells = (
                    row["shape"],
                    f"{row['seconds'] * 1e6:,.1f}{_goal(row, 'seconds', 1e6)}",
                    share,
                    ratios,
                    f"{row.get('spread', 0):.1%}",
                    ("" if memory is None else f"{memory / 2**20:,.0f}") + _goal(row, "peak_bytes", 2**-20),
                )
                lines.append(f"| {' | '.join(cells)} |")
    bad = [row for row in rows if "error" in row]
    return lines + ([""] if bad else []) + [f"- {row.get('name')}: **{_cell(row['error'])}**" for row in bad]


def _goal(row: dict[str, Any], entry: str, factor: float) -> str:
    """An entry's goal, in its unit in the table; "" for none."""
    goal = row.get("goals", {}).get(entry)
    return (
        ""
        if goal is None
        else f" (goal {goal['at_most'] * factor:,.0f}: {'met' if goal['is_met'] else '**missed**'})"
    )


def _plain_table(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the rows' own entries; those with the same entries share a table."""
    lines: list[str] = []
    heads: list[str] = []
    for row in rows:
        if list(row) != heads:
            heads = list(row)
            lines += [""] * bool(lines) + [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines.append(f"| {' | '.join(_cell(value) for value in row.values())} |")
    return lines


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
