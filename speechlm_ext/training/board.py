"""TensorBoard files, written as the log's lines are.

``SummaryWriter`` writes from a thread of its own: there a full disk ends in a traceback, and the training that goes on
hears of it at some later line or at its end. These are its own records, written and flushed at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """One event file of TensorBoard.

    Args:
        folder: made if it is missing.
        step: where the run goes on; later values of an earlier file are not shown.

    Raises:
        ImportError: tensorboard is not installed. OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        # Without a buffer, what cannot be written fails here and not again when the file is closed.
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 - closed in close()
        self._records = RecordWriter(self)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step, by tag. Raises ``OSError``."""
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def write(self, data: bytes) -> None:
        """Write a whole record; an unbuffered file takes a part where the disk has room for no more."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file. Raises ``OSError``."""
        self._file.close()
