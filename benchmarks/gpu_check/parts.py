"""The parts of a check. Each gives its status, ``passed``, ``failed``, ``timeout`` or ``skipped``, and a note."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check import rows, sanitizer
from benchmarks.gpu_check.process import ROOT, Child, Outcome, Row, watch
from benchmarks.gpu_check.report import Recorder

#: What a file with tests that need CUDA says. Other files may need packages that such machines lack.
_NEEDS_CUDA = re.compile(
    r"^@pytest\.mark\.cuda|^from python_tests\.conftest import .*\bCUDA\b|^def test_\w+\([^)]*\bdevice\b",
    re.M,
)
_LOG_BYTES = 1 << 18


@dataclass
class Check:
    """A run: where it runs and where its findings go."""

    device: str
    is_tiny: bool
    recorder: Recorder
    folder: Path
    """For the files of its processes."""
    log: Path
    """Their output, one after the other."""
    patience: float = 1.0
    """Factor on all times: more than 1 in a dry run, whose machine may be busy."""
    num_workers: int = 6
    """Processes of the tests."""
    output: list[str] = field(default_factory=list)
    """Last output of the part that runs."""

    def watch(
        self, part: str, child: Child, seconds: float, take: Callable[[Row], None] | None = None,
        is_late: Callable[[], bool] | None = None,
    ) -> Outcome:  # fmt: skip
        """Take the rows of a child into the record, or give them to ``take``."""
        outcome = watch(
            child, seconds, take or (lambda row: self.recorder.write("row", part=part, **row)), is_late
        )
        self.keep_log(child)
        self.output = outcome.tail
        return outcome

    def run(self, part: str, module: str, seconds: float, *options: str) -> tuple[str, str]:
        """A part that is one module of Python."""
        child = Child(part, [sys.executable, "-m", module, *options], self.folder)
        outcome = self.watch(part, child, seconds)
        return outcome.status, outcome.note

    def keep_log(self, child: Child) -> None:
        """Append a child's output to the log."""
        data = child.log.read_bytes()
        with self.log.open("ab") as log:
            log.write(f"\n==== {child.name}\n".encode() + data[-_LOG_BYTES:])


def part_build(check: Check, seconds: float) -> tuple[str, str]:
    """Compile ``_C`` for this card alone; on the CPU the build at hand is used."""
    if check.device == "cpu":
        return "skipped", "the build at hand is used"
    return check.run("build", "benchmarks.gpu_check.build", seconds)


def part_limits(check: Check, seconds: float) -> tuple[str, str]:
    """The card's own copy and matrix speed."""
    return check.run("limits", "benchmarks.gpu_check.limits", seconds, "--device", check.device)


def part_kernels(check: Check, seconds: float) -> tuple[str, str]:
    """What the ops are judged by."""
    return run_rows(check, "kernels", rows.names(rows.FIRST_ROWS, check.is_tiny), seconds)


def part_bench(check: Check, seconds: float) -> tuple[str, str]:
    """The ops' other shapes."""
    return run_rows(check, "bench", rows.names(rows.OTHER_ROWS, check.is_tiny), seconds)


class _RowTaker:
    """Takes the rows of one process of :mod:`.kernels`, and knows which row runs and since when."""

    def __init__(self, check: Check, part: str, left: list[str], failed: list[str]) -> None:
        self.check, self.part, self.left, self.failed = check, part, left, failed
        self.current: str | None = None
        self.since = time.monotonic()

    def __call__(self, row: Row) -> None:
        self.since = time.monotonic()
        if "begin" in row:
            if self.current is not None:
                self.fail("its row was lost")
            self.current = row["begin"]
            return
        self.check.recorder.write("row", part=self.part, **row)
        if self.current is not None:
            self.left.remove(self.current)
            if "error" in row:
                self.failed.append(self.current)
        self.current = None

    def fail(self, error: str) -> None:
        """Give up the row that runs."""
        assert self.current is not None
        self.failed.append(self.current)
        self.left.remove(self.current)
        self.check.recorder.write("row", part=self.part, name=self.current, error=error)
        self.current = None

    def seconds(self) -> float:
        """Since the last sign of life."""
        return time.monotonic() - self.since


def run_rows(
    check: Check,
    part: str,
    names: Sequence[str],
    seconds: float,
    row_seconds: float = 30,
    start_seconds: float = 45,
) -> tuple[str, str]:
    """Rows of the ops in one process; one that hangs, or breaks the device, costs that row and a new start.

    Args:
        row_seconds: maximum time of a row, inputs and checks included.
        start_seconds: maximum time until the first row begins.
    """
    deadline = time.monotonic() + seconds
    left, failed, notes = list(names), list[str](), list[str]()
    while left and deadline - time.monotonic() > 2:
        num_before = len(left)
        taker = _RowTaker(check, part, left, failed)

        def is_late(taker: _RowTaker = taker) -> bool:
            most = start_seconds if taker.current is None else row_seconds
            return taker.seconds() > most * check.patience

        command = [sys.executable, "-m", "benchmarks.gpu_check.kernels", "--device", check.device]
        command += ["--row-seconds", str(row_seconds / 4), "--rows", *left]
        outcome = check.watch(
            part, Child(part, command, check.folder), deadline - time.monotonic(), taker, is_late
        )
        if outcome.faults:
            notes.append(outcome.note)
        if outcome.code is None and time.monotonic() > deadline:
            break
        if taker.current is not None:
            taker.fail("took too long" if outcome.code is None else outcome.note or "its row was lost")
        if len(left) == num_before:  # a new start would do no better
            return "failed", outcome.note or "no row came"
    if failed:
        notes.insert(0, f"failed: {', '.join(failed)}")
    status = "failed" if notes else "timeout" if left else "passed"
    if left:
        notes.append(f"no time for: {', '.join(left)}")
    return status, "; ".join(notes)


def part_decode(check: Check, seconds: float) -> tuple[str, str]:
    """Decode steps of one request and of many."""
    options = (
        ["--shape", "smoke", "--batches", "1", "2", "--frames", "6"]
        if check.is_tiny
        else ["--batches", "1", "256"]
    )
    return check.run("decode", "benchmarks.generation.decode", seconds, "--device", check.device, *options)


def part_train(check: Check, seconds: float) -> tuple[str, str]:
    """Training steps."""
    return check.run("train", "benchmarks.train.step", seconds, "--device", check.device)


def cuda_tests() -> list[str]:
    """The files with tests that need CUDA."""
    files = sorted((ROOT / "python_tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if _NEEDS_CUDA.search(path.read_text("utf-8"))]


def part_tests(check: Check, seconds: float, tests: Sequence[str] = ()) -> tuple[str, str]:
    """The tests marked ``cuda``, of ``tests`` or of all files; where there is no GPU all of them are skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_check.pytest_rows", "-m", "cuda"]
    command += tests or cuda_tests()
    command += ["-v", "-rfE", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    missing = []
    # A thread ends the process of a test that waits for the card, where a signal would wait with it.
    for module, options in {
        "xdist": ["-n", str(check.num_workers)],
        "pytest_timeout": ["--timeout", "60", "--timeout-method", "thread"],
    }.items():
        if importlib.util.find_spec(module) is not None:
            command += options
        else:
            missing.append(module)
    counts: Counter[str] = Counter()

    def take(row: Row) -> None:
        counts[row["outcome"]] += 1
        # Of the others only what they recorded themselves.
        if row["outcome"] in ("failed", "error") or set(row) - {"test", "outcome", "message"}:
            check.recorder.write("row", part="tests", **row)

    outcome = check.watch("tests", Child("tests", command, check.folder), seconds, take)
    notes = [f"{count} {word}" for word, count in sorted(counts.items())]
    notes += [f"without {', '.join(missing)}, which is not installed"] if missing else []
    if outcome.status != "passed":
        # Exit code 1 says that a test failed, which the rows say better.
        notes += [outcome.note] if outcome.code != 1 or not counts else []
        return outcome.status, "; ".join(notes)
    return ("passed" if counts["passed"] else "skipped"), "; ".join(notes)


def part_sanitizer(check: Check, seconds: float) -> tuple[str, str]:
    """compute-sanitizer's four tools; on the CPU the ops that it would look at."""
    executable = sanitizer.find_tool(check.device)
    if executable is None:
        options = ["--device", check.device]
        status, note = check.run("sanitizer", "benchmarks.gpu_check.small_ops", seconds, *options)
        reason = "compute-sanitizer is not installed" if check.device == "cuda" else "no sanitizer on the CPU"
        return (
            "skipped" if status == "passed" else status
        ), f"{note}; {reason}; the ops ran without it".lstrip("; ")
    failed = []
    for row, children in sanitizer.run_tools(executable, check.device, check.folder, seconds):
        check.recorder.write("row", part="sanitizer", **row)
        if "error" in row:
            failed.append(f"{row['tool']}: {row['error']}")
        for child in children:
            check.keep_log(child)
    return ("failed" if failed else "passed"), "; ".join(failed)


PARTS: dict[str, Callable[[Check, float], tuple[str, str]]] = {
    "build": part_build,
    "limits": part_limits,
    "kernels": part_kernels,
    "decode": part_decode,
    "tests": part_tests,
    "sanitizer": part_sanitizer,
    "train": part_train,
    "bench": part_bench,
}
