"""Processes of a check: rows as they come, a log, and an end in time whatever they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.emit import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
_MARK = "SPEECHLM_CHECK_PROCESS"
_POLL_SECONDS = 0.05
_TAIL = 40

Row = dict[str, Any]


class Child:
    """A command in the project's root. Its rows and its output go to files, which no descendant can keep open for us.

    Args:
        name: of its files in ``folder``.
        env: variables besides those of this process.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.log, self._rows = name, folder / f"{name}.log", folder / f"{name}.rows"
        self._rows.write_bytes(b"")
        self._read, self._mark = 0, uuid.uuid4().hex
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONUNBUFFERED": "1",
                    VARIABLE: str(self._rows),
                    _MARK: self._mark,
                    **(env or {}),
                },
                start_new_session=True,
            )

    def new_rows(self, is_last: bool = False) -> list[Row | str]:
        """Rows since the last call. A line that is no JSON object is given as text; a half line only at the end."""
        with self._rows.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        end = len(data) if is_last else data.rfind(b"\n") + 1
        self._read += end
        found: list[Row | str] = []
        for line in data[:end].decode("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            found.append(row if isinstance(row, dict) else line)
        return found

    def tail(self) -> list[str]:
        """The last lines of the output."""
        size = self.log.stat().st_size
        with self.log.open("rb") as file:
            file.seek(max(0, size - 16_384))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-_TAIL:]

    def kill(self) -> None:
        """End the process and all its descendants, also those in sessions of their own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self._descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        # A process that waits for a broken driver cannot be killed: it must not keep us from going on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)

    def _descendants(self) -> list[int]:
        """Processes that inherited this child's mark, where the system shows their environment (Linux)."""
        mark, found = f"{_MARK}={self._mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


@dataclass
class Outcome:
    """How a command ended."""

    code: int | None
    """Its exit code; None: it was out of time."""
    num_rows: int = 0
    faults: list[str] = field(default_factory=list)
    """Lines of its rows that are none."""
    tail: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``passed``, ``failed`` or ``timeout``."""
        if self.code is None:
            return "timeout"
        return "failed" if self.code != 0 or self.faults or not self.num_rows else "passed"

    @property
    def note(self) -> str:
        """Why it did not pass; "" if it did."""
        if self.status == "passed":
            return ""
        notes = [f"a row that is no JSON object: {self.faults[0][:120]!r}"] if self.faults else []
        if self.code:
            notes.append(f"exit code {self.code}" if self.code > 0 else f"killed by signal {-self.code}")
        if not self.num_rows:
            notes.append("no row came")
        return "; ".join([*notes, *(line.strip()[:200] for line in self.tail[-1:])])


def watch(
    child: Child, seconds: float, take: Callable[[Row], None], is_late: Callable[[], bool] | None = None
) -> Outcome:
    """Take the rows of a child until it ends, is out of time or ``is_late()``; then nothing of it runs any more."""
    deadline, out = time.monotonic() + seconds, Outcome(None)

    def read(is_last: bool = False) -> None:
        for row in child.new_rows(is_last):
            if isinstance(row, str):
                out.faults.append(row)
            else:
                out.num_rows += 1
                take(row)

    try:
        while True:
            code = child.process.poll()
            if code is not None:
                out.code = code
                break
            read()
            if time.monotonic() > deadline or (is_late is not None and is_late()):
                break
            time.sleep(_POLL_SECONDS)
    finally:
        child.kill()
    # Out of time, a half line is what was being written, and no fault.
    read(is_last=out.code is not None)
    out.tail = child.tail()
    return out
