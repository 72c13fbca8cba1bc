"""``trainer_state.json``: the progress of a run, and its strict reader."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from speechlm_ext.errors import CheckpointError
from speechlm_ext.utils.files.checkpoint_folders import STATE_NAME
from speechlm_ext.utils.files.json_text import read_json


@dataclass
class TrainerState:
    """State of a run besides weights and moments."""

    step: int = 0
    """Optimizer steps done."""
    packs_consumed: int = 0
    """Packs that all processes together have consumed: the loader's whole state."""
    optimizer_step: float = 0.0
    """AdamW's own step counter, which its bias correction uses."""
    plan: str = ""
    """Fingerprint of the pack plan that ``packs_consumed`` counts in."""
    seconds: float = 0.0
    """Training time so far, in seconds."""
    meter: dict[str, Any] | None = None
    """Sums of the log interval under way; see :class:`speechlm_ext.training.meter.Meter`."""


def read_state(folder: Path) -> TrainerState:
    """Read ``trainer_state.json`` of a checkpoint.

    Raises:
        CheckpointError: the folder is not a checkpoint that can be trained on.
    """
    path = folder / STATE_NAME
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder} does not exist; nothing was started. Give a folder step-… of a run."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a training checkpoint: it has no {STATE_NAME}. An exported model folder can be "
            f"generated from, but to train on it needs the optimizer's state."
        )
    hint = "use an older checkpoint of the run."
    record = read_json(path, CheckpointError, hint)
    if isinstance(record, dict):
        record.pop("totals", None)  # of older versions
    known = {field.name for field in fields(TrainerState)}
    if not isinstance(record, dict) or set(record) - known:
        odd = sorted(set(record) - known) if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(f"{path} is damaged: expected the fields {sorted(known)}, got {odd}; {hint}")
    kinds = {
        "step": _is_count,
        "packs_consumed": _is_count,
        "optimizer_step": _is_amount,
        "plan": lambda value: isinstance(value, str),
        "seconds": _is_amount,
        "meter": lambda value: value is None or _is_meter(value),
    }
    for name, is_kind in kinds.items():
        if name in record and not is_kind(record[name]):
            raise CheckpointError(f"{path} is damaged: {name} is {str(record[name])[:80]!r}; {hint}")
    missing = known - {"meter"} - set(record)
    if missing:
        raise CheckpointError(f"{path} is damaged: {sorted(missing)[0]} is missing; {hint}")
    return TrainerState(**record)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_meter(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"steps", "seconds", "ranks"}:
        return False
    ranks = value["ranks"]
    return (
        _is_count(value["steps"])
        and _is_amount(value["seconds"])
        and isinstance(ranks, list)
        and len(ranks) > 0
        and all(isinstance(sums, list) and sums and all(_is_number(v) for v in sums) for sums in ranks)
        and len({len(sums) for sums in ranks}) == 1
    )
