"""The state of a fit: everything that an iteration needs and changes, and its checkpoint for an exact resume.

A checkpoint is a folder with ``kmeans_state.json`` (settings, data, progress of the fit, name and sha256 of the file of
its tensors) and one ``kmeans_state-*.safetensors``. The JSON is written last and atomically, so the pair that it names
is always complete; an interrupted write leaves the previous pair. Rank 0 reads and writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from speechlm_ext.errors import CheckpointError, KMeansError, foreign_errors
from speechlm_ext.kmeans.fit.ranks import Ranks
from speechlm_ext.utils.files.io import atomic_write_bytes, atomic_write_json
from speechlm_ext.utils.files.json_shape import SHA256, check_shape
from speechlm_ext.utils.files.json_text import parse_json
from speechlm_ext.utils.finite import require_finite

STATE_NAME = "kmeans_state.json"
VERSION = 1


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
    def from_disk(cls, tensors: dict[str, Tensor], record: dict[str, Any], device: torch.device) -> State:
        """The state of :meth:`to_disk`. Raises ``KeyError`` or ``TypeError``: something is missing."""
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        best = record.pop("best", None)
        if best is not None:
            names = ("centers", "counts", "seen")
            best = Best(**best, **{name: moved[f"best.{name}"] for name in names})
        return cls(centers=moved["centers"], seen=moved["seen"], best=best, **record)


def _split(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a dataclass that are tensors, and the others."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


class Checkpoint:
    """The checkpoint of a fit of ``settings`` and ``data`` (JSON values); one of others is refused."""

    def __init__(
        self, folder: str | Path, ranks: Ranks, settings: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        self.folder, self.ranks = Path(folder), ranks
        # As JSON returns them: tuples become lists.
        self.identity = json.loads(json.dumps({"settings": dict(settings), "data": dict(data)}))

    def load(self, device: torch.device) -> State | None:
        """The state to resume from, None without a checkpoint. Raises :class:`CheckpointError` on every rank."""
        head, blob, error = b"", b"", None
        if self.ranks.rank == 0:
            try:
                head, blob = self._read()
            except CheckpointError as caught:
                error = caught
        self.ranks.raise_any(error)
        head, blob = self.ranks.gather_bytes(head)[0], self.ranks.gather_bytes(blob)[0]
        if not head:
            return None
        with foreign_errors(CheckpointError, f"checkpoint {self.folder} cannot be used", _WAY_OUT):
            return State.from_disk(load_tensors(blob), parse_json(head)["state"], device)

    def _read(self) -> tuple[bytes, bytes]:
        path = self.folder / STATE_NAME
        if not path.exists():
            if self.folder.is_file():
                raise CheckpointError(f"checkpoint {self.folder} is a file; give a folder.")
            if any(self.folder.glob("kmeans_state-*.safetensors")):
                raise CheckpointError(
                    f"checkpoint {self.folder} has tensors but no {STATE_NAME}; delete the folder to start from the "
                    "beginning, or choose another."
                )
            return b"", b""
        with foreign_errors(CheckpointError, f"checkpoint {path} cannot be used as it is", _WAY_OUT):
            head = path.read_bytes()
            record = parse_json(head)
            check_shape(record, _SHAPE)
            if record["version"] != VERSION:
                raise CheckpointError(
                    f"{path}: version {record['version']} is not {VERSION}; use the release that wrote it."
                )
            blob = (self.folder / record["tensors"]).read_bytes()
            state, found = record["state"], {"settings": record["settings"], "data": record["data"]}
            if hashlib.sha256(blob + _state_bytes(state)).hexdigest() != record["sha256"]:
                raise ValueError("content does not match its sha256")
            load_tensors(blob)
        self._compare(found)
        return head, blob

    def _compare(self, found: Mapping[str, Any]) -> None:
        for part, values in self.identity.items():
            for key, value in values.items():
                stored = found[part].get(key)
                if stored != value:
                    raise CheckpointError(
                        f"checkpoint {self.folder} is of a fit with {part} {key} = {_short(stored)}, this one has "
                        f"{_short(value)}; give the same {part} to resume, or another folder to start anew."
                    )

    def save(self, state: State) -> None:
        """Write the state; on KMeansError (not finite) or StorageError the previous checkpoint is untouched."""
        error: Exception | None = None
        if self.ranks.rank == 0:
            try:
                self._write(state)
            except Exception as caught:
                error = caught
        self.ranks.raise_any(error)

    def _write(self, state: State) -> None:
        tensors, record = state.to_disk()
        numbers = [v for v in (*state.history, state.smoothed, state.lowest) if v is not None]
        checked = tensors | {"inertia": torch.tensor(numbers, dtype=torch.float64)}
        hint = "The rows are too large for their type; the previous checkpoint is untouched."
        require_finite(checked, KMeansError, f"the fit was not saved to {self.folder}", hint)
        blob = save_tensors(tensors)
        name = f"kmeans_state-{state.run}-{state.iteration}-{'done' if state.done else 'going'}.safetensors"
        atomic_write_bytes(self.folder / name, blob)
        head = {
            "version": VERSION,
            "tensors": name,
            "sha256": hashlib.sha256(blob + _state_bytes(record)).hexdigest(),
            **self.identity,
            "state": record,
        }
        atomic_write_json(self.folder / STATE_NAME, head)
        for old in self.folder.glob("kmeans_state-*.safetensors"):
            if old.name != name:
                with contextlib.suppress(OSError):
                    old.unlink()


_WAY_OUT = "It is damaged: delete the folder to start from the beginning, or restore it."
_SHAPE = {"version": int, "tensors": str, "sha256": SHA256, "settings": dict, "data": dict, "state": dict}


def _state_bytes(state: Mapping[str, Any]) -> bytes:
    return json.dumps(state, sort_keys=True).encode()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
