"""The run's log: JSON lines always, TensorBoard where installed, a progress bar where a person looks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechlm_ext.utils.io import atomic_write_text, storage_error

LOG_NAME = "log.jsonl"
logger = logging.getLogger("speechlm_ext")


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read a run's log; a last line that was cut by a crash is left out."""
    path = Path(run_dir) / LOG_NAME
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class RunLog:
    """Writes the log of one run (rank 0 only; on other ranks it does nothing).

    Args:
        run_dir: the run's folder.
        step: where the run goes on; later lines, written before a crash, are removed so that each step
            stands once.
        total: steps in all, for the bar.
        active: whether this process writes.
        tensorboard: also write TensorBoard files, if it is installed.

    Raises:
        StorageError: the log cannot be written.
    """

    def __init__(self, run_dir: Path, step: int, total: int, active: bool, tensorboard: bool) -> None:
        self.active, self.file, self.board, self.bar = active, None, None, None
        if not active:
            return
        self.path = run_dir / LOG_NAME
        kept = [row for row in read_log(run_dir) if row["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning(
                    "tensorboard is not installed: only %s is written (pip install tensorboard)", self.path
                )
            else:
                self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(
            total=total, initial=step, unit="step", desc="train", disable=None, dynamic_ncols=True
        )

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def write(self, row: Mapping[str, Any], postfix: str) -> None:
        """Write one line; ``row`` has ``step`` and numbers or flat dicts of numbers."""
        if not self.active or self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise storage_error(error, self.path) from error
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(postfix)
        else:
            logger.info("step %d  %s", row["step"], postfix)
        if self.board is not None:
            for key, value in row.items():
                values = value.items() if isinstance(value, Mapping) else [("", value)]
                for name, number in values:
                    if key != "step" and isinstance(number, (int, float)):
                        self.board.add_scalar(f"{key}/{name}" if name else key, number, row["step"])

    def close(self) -> None:
        """Close the files and the bar."""
        for thing in (self.file, self.board, self.bar):
            if thing is not None:
                thing.close()
