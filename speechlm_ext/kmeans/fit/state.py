"""The state of a fit: everything that an iteration needs and changes, stored as tensors and JSON without loss."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.errors import CheckpointError


class Step(NamedTuple):
    """Statistics of one iteration."""

    inertia: float
    """Lloyd: sum of squared distances of all rows; mini-batch: squared distance per row of the batch."""
    shift: float
    """Squared movement of all centroids."""
    num_empty: int
    """Clusters that had no rows (mini-batch: too few) and were reseeded."""


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
    """An unfinished fit."""

    centers: Tensor
    """``[K, F]``, float32 or float64."""
    seen: Tensor
    """float64 ``[K]``: rows that each centroid has learned from; mini-batch only."""
    run: int = 0
    """Number of the start, from 0 to ``n_init - 1``."""
    iteration: int = 0
    """Iterations (Lloyd) or steps (mini-batch) done."""
    done: bool = False
    history: list[float] = field(default_factory=list)
    """Inertia before each iteration."""
    smoothed: float | None = None
    """Mini-batch: exponentially weighted mean of the batches' inertia per row."""
    lowest: float | None = None
    """Mini-batch: minimum of ``smoothed`` so far."""
    num_stale: int = 0
    """Mini-batch: steps since that minimum."""
    rows_since_reassignment: int = 0
    """Mini-batch: rows since the last check for starved centroids."""
    best: Best | None = None

    def to_disk(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values for :meth:`from_disk`."""
        tensors, record = _split(self)
        if record.pop("best") is not None:
            best_tensors, record["best"] = _split(self.best)
            tensors |= {f"best.{name}": tensor for name, tensor in best_tensors.items()}
        # Clones: the best centroids may be the present ones, and safetensors refuses shared memory.
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, record

    @classmethod
    def from_disk(
        cls, tensors: dict[str, Tensor], record: dict[str, Any], device: torch.device, where: str
    ) -> State:
        """Raises :class:`CheckpointError`: something is missing."""
        try:
            values = dict(record)
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            best = values.pop("best", None)
            if best is not None:
                names = ("centers", "counts", "seen")
                best = Best(**best, **{name: moved[f"best.{name}"] for name in names})
            return cls(centers=moved["centers"], seen=moved["seen"], best=best, **values)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{where} is not the state of a K-Means fit ({error}); delete the folder to start from the beginning."
            ) from None


def _split(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a dataclass that are tensors, and the others."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}
