"""Benchmark results as rows, from whatever wrote them: pytest-benchmark's JSON, or the history of a device
that ``make gpu-check`` writes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechlm_ext.utils.files.json_text import parse_json


class ResultsError(Exception):
    """A file that holds no benchmark results."""


@dataclass(frozen=True)
class Row:
    """One op on one shape and device."""

    op: str
    shape: str
    device: str
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    """Rival's time divided by ours: above 1 we are faster."""
    limit_fraction: float | None = None
    peak_bytes: int | None = None
    spread: float = 0.0
    """Median of our rounds divided by the best, minus 1."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity of a row across files."""
        return (self.op, self.shape, self.device)


@dataclass(frozen=True)
class Results:
    """The rows of one run, its commit, date and machine."""

    path: Path
    commit: str
    date: str
    machine: str
    """Name of the processor, or of the GPU."""
    rows: list[Row]

    def kind_of(self, row: Row) -> str:
        """The kind of device that a row was measured on: the GPU's name, or the processor's."""
        return self.machine if row.device == "cpu" else row.device

    @property
    def kinds(self) -> set[str]:
        """The kinds of devices of all rows."""
        return {self.kind_of(row) for row in self.rows}


def read_all(path: str | Path) -> list[Results]:
    """The runs of a results file, oldest first.

    Raises:
        ResultsError: it cannot be read, or holds no results.
    """
    path = Path(path)
    try:
        data = parse_json(path.read_bytes(), allow_nan=True)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a JSON file of benchmark results ({error}).") from None
    if isinstance(data, dict) and isinstance(data.get("benchmarks"), list):
        commit, date = data.get("commit_info", {}).get("id", "unknown"), data.get("datetime", "")
        machine = data.get("machine_info", {}).get("cpu", {}).get("brand_raw", "unknown processor")
        raw = [{"seconds": b["stats"]["min"], **b["extra_info"]} for b in data["benchmarks"]]
        return [Results(path, commit, date, machine, [_row(r, path) for r in raw])]
    if isinstance(data, dict) and isinstance(data.get("runs"), list):
        return [_run(path, run) for run in data["runs"]]
    raise ResultsError(f"{path}: neither pytest-benchmark's JSON nor a history of make gpu-check.")


def read(path: str | Path) -> Results:
    """The newest results of a file: its last run with rows, and the rows that only earlier ones of its commit have.

    Raises:
        ResultsError: it cannot be read, or holds no results.
    """
    runs = [results for results in read_all(path) if results.rows]
    if not runs:
        raise ResultsError(f"{path}: holds no row of a benchmark.")
    newest = runs[-1]
    rows = {row.key: row for results in runs if results.commit == newest.commit for row in results.rows}
    return replace(newest, rows=list(rows.values()))


def _run(path: Path, run: dict[str, Any]) -> Results:
    """A run of a device's history."""
    try:
        parts = run["parts"]
        raw = [
            row
            for name in ("kernels", "bench")
            for row in parts.get(name, {}).get("rows", [])
            if "seconds" in row
        ]
        return Results(path, run["commit"], run["started"], run["device"], [_row(r, path) for r in raw])
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path}: a run without {error}; it was written by another version.") from None


def _row(raw: dict[str, Any], path: Path) -> Row:
    try:
        return Row(
            op=raw["op"],
            shape=raw["shape"],
            device=raw["device"],
            seconds=float(raw["seconds"]),
            ratios={str(k): float(v) for k, v in raw.get("ratios", {}).items()},
            limit_fraction=raw.get("limit_fraction"),
            peak_bytes=raw.get("peak_bytes"),
            spread=float(raw.get("spread") or 0.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: a row without {error}; it was written by another version.") from None
