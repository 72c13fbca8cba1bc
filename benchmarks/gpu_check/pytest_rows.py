"""A pytest plugin that hands over a row per test as it ends: ``pytest -p benchmarks.gpu_check.pytest_rows``.

What a test records with pytest's ``record_property`` (counts of synchronizations or launches, say) is in its row.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.common.emit import VARIABLE, emit


def pytest_configure(config: pytest.Config) -> None:
    """Rows come from the process that the others report to, and not from tests that start programs that measure."""
    if hasattr(config, "workerinput"):
        os.environ.pop(VARIABLE, None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One row for each test: when its call is over, or where it ended before."""
    if VARIABLE not in os.environ:
        return
    if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
        _emit(report, "error" if report.failed and report.when != "call" else report.outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A row for each file that cannot be imported."""
    if report.failed and VARIABLE in os.environ:
        _emit(report, "error")


def _emit(report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
    row = {"test": report.nodeid, "outcome": outcome, **dict(getattr(report, "user_properties", []))}
    if outcome in ("failed", "error"):
        lines = [line for line in report.longreprtext.splitlines() if line.strip()]
        marked = [line[1:].strip() for line in lines if line.startswith("E ")]
        row["message"] = (marked or lines[-1:] or [""])[0][:300]
    elif outcome == "skipped" and isinstance(report.longrepr, tuple):
        row["message"] = str(report.longrepr[2])[:300]
    emit(row)
