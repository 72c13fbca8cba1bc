"""Benchmark results as rows, from whatever wrote them: pytest-benchmark's JSON, or a report of ``make gpu-check``."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """The rows of one file, its commit and date."""

    path: Path
    commit: str
    date: str
    rows: list[Row]


def read(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        ResultsError: it cannot be read, or holds no results.
    """
    path = Path(path)
    try:
        data = parse_json(path.read_bytes(), allow_nan=True)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a JSON file of benchmark results ({error}).") from None
    if isinstance(data, dict) and "benchmarks" in data:
        commit, date = data.get("commit_info", {}).get("id", "unknown"), data.get("datetime", "")
        raw = [{"seconds": b["stats"]["min"], **b["extra_info"]} for b in data["benchmarks"]]
    elif isinstance(data, dict) and "parts" in data:
        commit, date = data["commit"], data["started"]
        raw = data["parts"].get("bench", {}).get("data", {}).get("rows", [])
    else:
        raise ResultsError(f"{path}: neither pytest-benchmark's JSON nor a report of make gpu-check.")
    return Results(path, commit, date, [_row(r, path) for r in raw])


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
