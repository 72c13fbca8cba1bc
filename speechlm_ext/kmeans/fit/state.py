"""Where a fit stands: all that an iteration needs and changes, in a form that goes to disk and back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.errors import CheckpointError


class Step(NamedTuple):
    """What one iteration reports."""

    inertia: float
    """Sum of squared distances, of all rows or (mini-batch) scaled to all rows."""
    shift: float
    """Squared movement of all centroids."""
    num_empty: int
    """Clusters that were without rows, or starved, and were given one."""


@dataclass
class Best:
    """The best finished start of several."""

    centers: Tensor
    inertia: float
    counts: Tensor
    history: list[float]
    iterations: int
    seen: Tensor


@dataclass
class State:
    """A fit under way."""

    centers: Tensor
    """``[K, F]``, float32 or float64."""
    seen: Tensor
    """float64 ``[K]``: rows that each centroid has learnt from; mini-batch only."""
    run: int = 0
    """Which of ``n_init`` starts."""
    iteration: int = 0
    """Iterations (Lloyd) or steps (mini-batch) done."""
    done: bool = False
    history: list[float] = field(default_factory=list)
    """Inertia before each iteration."""
    smoothed: float | None = None
    """Mini-batch: exponentially weighted mean of the batches' inertia per row."""
    lowest: float | None = None
    """Mini-batch: the lowest that ``smoothed`` was."""
    num_stale: int = 0
    """Mini-batch: steps since then."""
    rows_since_reassignment: int = 0
    """Mini-batch: rows since starved centroids were looked for."""
    best: Best | None = None

    def to_disk(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that :meth:`from_disk` takes."""
        tensors = {"centers": self.centers, "seen": self.seen}
        names = (
            "run",
            "iteration",
            "done",
            "history",
            "smoothed",
            "lowest",
            "num_stale",
            "rows_since_reassignment",
        )
        record: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.best is not None:
            b = self.best
            tensors |= {"best.centers": b.centers, "best.counts": b.counts, "best.seen": b.seen}
            record["best"] = {"inertia": b.inertia, "history": b.history, "iterations": b.iterations}
        # Clones: the best centroids may be the present ones, and safetensors takes no memory twice.
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, record

    @classmethod
    def from_disk(
        cls, tensors: dict[str, Tensor], record: dict[str, Any], device: torch.device, where: str
    ) -> State:
        """Raises :class:`CheckpointError` when something is missing."""
        try:
            fields = dict(record)
            best = fields.pop("best", None)
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            if best is not None:
                best = Best(
                    centers=moved["best.centers"],
                    counts=moved["best.counts"],
                    seen=moved["best.seen"],
                    **best,
                )
            return cls(centers=moved["centers"], seen=moved["seen"], best=best, **fields)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{where} is not the state of a K-Means fit ({error}); delete the folder to start from the beginning."
            ) from None
