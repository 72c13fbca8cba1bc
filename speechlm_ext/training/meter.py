"""The numbers of a log line: sums over the log interval, kept on the device and gathered once per line.

A checkpoint in the middle of an interval holds the sums so far, so a resumed run logs the line of a run that was never
stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from speechlm_ext.errors import CheckpointError

#: Rows of the sums of each stream: losses, their weights, number of tokens, number of correct predictions.
LOSS, WEIGHT, COUNT, CORRECT = range(4)


class Meter:
    """Sums of one process over a log interval, on the model's device."""

    def __init__(self, num_streams: int, device: torch.device) -> None:
        self.num_streams, self.device = num_streams, device
        self.reset()

    def reset(self) -> None:
        """Start an interval."""
        # The loss, the positions, and the streams' sums.
        self.sums = torch.zeros(2 + 4 * self.num_streams, dtype=torch.float64, device=self.device)
        self.step_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.num_steps = 0
        self.started = time.perf_counter()

    def start_step(self) -> None:
        """Start a step."""
        self.num_steps += 1
        self.step_loss = torch.zeros_like(self.step_loss)
        self.before = self.sums.clone()

    def undo_step(self) -> None:
        """Remove the newest step from the sums."""
        self.num_steps -= 1
        self.sums = self.before

    def loss_of_step(self) -> float:
        """The newest step's loss over all processes; they wait for each other."""
        loss = self.step_loss.clone()
        distributed.all_reduce(loss)
        return float(loss)

    def add(self, out: Any, step_weight: float, positions: int) -> None:
        """Add one micro-batch: the model's output, the weight of the whole step, and the number of positions."""
        loss = out.loss_sum.detach().double() / step_weight
        self.step_loss += loss
        self.sums[0] += loss
        self.sums[1] += positions
        parts = (out.stream_loss, out.stream_weight, out.stream_count, out.stream_correct)
        self.sums[2:] += torch.stack([part.detach().double() for part in parts]).flatten()

    def gather(self) -> Tensor:
        """float64 ``[processes, 2 + 4 S]``: every process's sums, on every process, on the CPU."""
        parts = [torch.empty_like(self.sums) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, self.sums)
        return torch.stack(parts).cpu()

    def means(self, names: Sequence[str]) -> dict[str, Any]:
        """Means of the interval over all processes, as a log line has them; ``names`` are the streams'."""
        seconds = time.perf_counter() - self.started
        sums = self.gather().sum(0)
        streams = sums[2:].view(4, len(names))
        # A stream without a target in the interval has no mean.
        live = [
            (n, *column.tolist()) for n, column in zip(names, streams.T, strict=True) if column[COUNT] > 0
        ]
        total = float(streams[LOSS].sum())
        return {
            "loss": float(sums[0]) / self.num_steps,
            "stream_loss": {n: part[LOSS] / part[WEIGHT] for n, *part in live},
            "stream_accuracy": {n: part[CORRECT] / part[COUNT] for n, *part in live},
            "stream_share": {n: part[LOSS] / total if total else 0.0 for n, *part in live},
            "positions_per_second": float(sums[1]) / seconds,
        }

    def to_state(self, gathered: Tensor) -> dict[str, Any]:
        """The sums so far as JSON values, for a checkpoint."""
        seconds = time.perf_counter() - self.started
        return {"steps": self.num_steps, "seconds": seconds, "ranks": gathered.tolist()}

    def restore(self, state: dict[str, Any] | None, where: str) -> None:
        """Continue the interval of a checkpoint; None: start one.

        Raises:
            CheckpointError: it has another number of streams.
        """
        self.reset()
        if state is None:
            return
        sums = torch.tensor(state["ranks"], dtype=torch.float64)
        if sums.shape[1] != len(self.sums):
            raise CheckpointError(
                f"{where} is damaged: its meter has {sums.shape[1]} sums, expected {len(self.sums)}; use an older "
                "checkpoint of the run."
            )
        rank, world = distributed.get_rank(), distributed.get_world_size()
        if len(sums) == world:
            self.sums.copy_(sums[rank])
        elif rank == 0:
            self.sums.copy_(sums.sum(0))
        self.num_steps = state["steps"]
        self.started -= state["seconds"]
