"""The run's log: JSON lines always, TensorBoard where installed, a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechlm_ext.errors import CheckpointError, TrainingError
from speechlm_ext.utils.files.io import atomic_write_text, storage_error
from speechlm_ext.utils.files.json_text import JsonLine, json_line, json_lines

LOG_NAME = "log.jsonl"
logger = logging.getLogger("speechlm_ext")


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read a run's log; a last line that was cut by a crash is left out.

    Raises:
        CheckpointError: it cannot be read, or a line is not one of a log.
    """
    path = Path(run_dir) / LOG_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None
    whole, _, cut = data.rpartition(b"\n")
    rows = [_parse(line) for line in json_lines(path, whole)]
    if cut.strip():
        try:
            rows.append(_parse(JsonLine(path, whole.count(b"\n") + 2, cut)))
        except CheckpointError:
            logger.info("%s: its last line was cut off and is left out", path)
    return rows


def _parse(line: JsonLine) -> dict[str, Any]:
    hint = "delete the line, or move the file away."
    try:
        row = line.object()
    except ValueError as error:
        raise CheckpointError(f"{line.where} is damaged: {error}; {hint}") from None
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise CheckpointError(f"{line.where} is not a line of a log: it has no step; {hint}")
    return row


class RunLog:
    """Writes the log of a run on rank 0; does nothing on other ranks.

    Args:
        run_dir: the run's folder.
        step: steps done; lines of later steps, written before a crash, are removed.
        total: number of steps of the run, for the bar.
        active: whether this process writes.
        tensorboard: also write TensorBoard files, if it is installed. Where they cannot be written, a warning is logged
            and training continues without them.

    Raises:
        CheckpointError: the existing log is damaged.
        StorageError: the log cannot be written.
    """

    def __init__(self, run_dir: Path, step: int, total: int, active: bool, tensorboard: bool) -> None:
        self.run_dir, self.active = run_dir, active
        self.file, self.board, self.bar = None, None, None
        if not active:
            return
        self.path = run_dir / LOG_NAME
        kept = [row for row in read_log(run_dir) if row["step"] <= step]
        atomic_write_text(self.path, "".join(map(json_line, kept)))
        try:
            # Without a buffer, a failed write fails in write() and not again in close().
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        except OSError as error:
            raise storage_error(error, self.path) from error
        if tensorboard:
            with self._board_errors():
                self.board = Board(run_dir / "tensorboard", step)
        self.bar = tqdm(
            total=total, initial=step, unit="step", desc="train", disable=None, dynamic_ncols=True
        )

    @contextlib.contextmanager
    def _board_errors(self) -> Iterator[None]:
        """Block after whose failure training continues without TensorBoard."""
        try:
            yield
        except ImportError:
            logger.warning(
                "tensorboard is not installed: only %s is written (pip install tensorboard)", self.path
            )
        except OSError as error:
            self.board = None
            logger.warning(
                "TensorBoard's files cannot be written (%s): training continues without them, %s has all numbers",
                error.strerror or error,
                self.path,
            )

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one line; ``row`` has ``step``, and finite numbers or flat dicts of finite numbers.

        Raises:
            TrainingError: a number is not finite; nothing is written.
            StorageError: the line cannot be written.
        """
        if not self.active or self.file is None:
            return
        values: dict[str, float] = {}
        for key, value in row.items():
            parts = value.items() if isinstance(value, Mapping) else [("", value)]
            for name, number in parts:
                if not math.isfinite(number):
                    raise TrainingError(
                        f"{key} {name} is {number} at step {row['step']}, which cannot be logged."
                    )
                if key != "step":
                    values[f"{key}/{name}" if name else key] = number
        try:
            _write_all(self.file, json_line(row).encode())
        except OSError as error:
            raise storage_error(error, self.path) from error
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(_summary(row))
        else:
            logger.info("step %d  %s", row["step"], _summary(row))
        if self.board is not None:
            with self._board_errors():
                self.board.add(row["step"], values)

    def close(self) -> None:
        """Close the files and the bar.

        Raises:
            StorageError: the last lines do not reach the disk.
        """
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            with self._board_errors():
                self.board.close()
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                raise storage_error(error, self.path) from error


def _write_all(file: FileIO, data: bytes) -> None:
    """Write all of ``data``: an unbuffered file takes a part where the disk has room for no more."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _summary(row: Mapping[str, Any]) -> str:
    """The numbers of a line that a person watches: the loss, that of the first and the last streams, and the speed."""
    streams = list(row.get("stream_loss", {}).items())
    shown = [f"{name} {value:.2f}" for name, value in streams[:3]]
    shown += [f"… {streams[-1][1]:.2f}"] if len(streams) > 3 else []
    shown += [f"lr {row['lr']:.1e}"] if "lr" in row else []
    speed = row.get("positions_per_second")
    shown += [] if speed is None else [f"{speed:,.0f} positions/s"]
    return "  ".join([f"loss {row['loss']:.3f}", *shown])


class Board:
    """One event file of TensorBoard, each record written and flushed at once.

    ``SummaryWriter`` writes from a thread of its own: there a full disk ends in a traceback, and the training loop
    notices it some lines later or at its end. Values of an earlier file after ``step`` are not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        # Without a buffer, a failed write fails here and not again in close().
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
        """Write a whole record."""
        _write_all(self._file, data)

    def close(self) -> None:
        """Close the file. Raises ``OSError``."""
        self._file.close()
