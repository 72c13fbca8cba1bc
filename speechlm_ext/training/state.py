"""``trainer_state.json``: the progress of a run, and its strict reader."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm_ext.errors import CheckpointError
from speechlm_ext.utils.files.checkpoint_folders import STATE_NAME
from speechlm_ext.utils.files.json_shape import SIZE, Range, check_shape, read_shaped


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
    record = read_shaped(path, _STATE, CheckpointError, _HINT)
    record.pop("totals", None)  # of older versions
    meter = record.get("meter")
    try:
        if meter is not None:
            check_shape(meter, _METER, "meter")
            if len({len(sums) for sums in meter["ranks"]}) != 1 or [] in meter["ranks"]:
                raise ValueError("meter.ranks: expected a list of equal length for each rank")
    except ValueError as problem:
        raise CheckpointError(f"{path} is damaged: {problem}; {_HINT}") from None
    return TrainerState(**record)


_HINT = "use an older checkpoint of the run."
_AMOUNT = Range(float, 0, sys.float_info.max)
_STATE = {
    "step": SIZE,
    "packs_consumed": SIZE,
    "optimizer_step": _AMOUNT,
    "plan": str,
    "seconds": _AMOUNT,
    "meter?": dict | None,
    "totals?": Any,
}
_METER = {"steps": SIZE, "seconds": _AMOUNT, "ranks": list[list[float]]}
