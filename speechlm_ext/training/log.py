"""The run's log: JSON lines always, TensorBoard where installed, a progress bar where a person looks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechlm_ext.errors import CheckpointError, TrainingError
from speechlm_ext.training.board import Board
from speechlm_ext.utils.files.io import atomic_write_text, storage_error
from speechlm_ext.utils.files.json_lines import JsonLine, json_lines
from speechlm_ext.utils.files.json_text import json_line

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
    """Writes the log of one run (rank 0 only; on other ranks it does nothing).

    Args:
        run_dir: the run's folder.
        step: where the run goes on; later lines, written before a crash, are removed so that each step
            stands once.
        total: steps in all, for the bar.
        active: whether this process writes.
        tensorboard: also write TensorBoard files, if it is installed. Where they cannot be written, training goes on
            without them, and a warning says so.

    Raises:
        CheckpointError: the log of before is damaged.
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
            # Without a buffer, what cannot be written fails in write() and not again in close().
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        except OSError as error:
            raise storage_error(error, self.path) from error
        if tensorboard:
            try:
                self.board = Board(run_dir / "tensorboard", step)
            except ImportError:
                logger.warning(
                    "tensorboard is not installed: only %s is written (pip install tensorboard)", self.path
                )
            except OSError as error:
                self._leave_board(error)
        self.bar = tqdm(
            total=total, initial=step, unit="step", desc="train", disable=None, dynamic_ncols=True
        )

    def _leave_board(self, error: OSError) -> None:
        self.board = None
        logger.warning(
            "TensorBoard's files cannot be written (%s): training goes on without them, %s has all numbers",
            error.strerror or error,
            self.path,
        )

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def write(self, row: Mapping[str, Any], postfix: str) -> None:
        """Write one line; ``row`` has ``step`` and finite numbers or flat dicts of finite numbers.

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
            rest = memoryview(json_line(row).encode())
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise storage_error(error, self.path) from error
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(postfix)
        else:
            logger.info("step %d  %s", row["step"], postfix)
        if self.board is not None:
            try:
                self.board.add(row["step"], values)
            except OSError as error:
                self._leave_board(error)

    def close(self) -> None:
        """Close the files and the bar.

        Raises:
            StorageError: what was written does not reach the disk.
        """
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                self._leave_board(error)
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                raise storage_error(error, self.path) from error
