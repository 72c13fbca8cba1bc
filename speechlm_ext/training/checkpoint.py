"""Checkpoints: a folder that resumes training, generates, and is uploaded as it is.

A checkpoint is a model folder (fp32 weights) plus ``optimizer.safetensors`` and ``trainer_state.json``. The
optimizer's moments are stored per parameter, gathered from DeepSpeed's partitions, so a run resumes on any number of
processes with any ZeRO stage, and nothing is unpickled. A folder gets its final name when all of it is on the disk and
every value in it is finite.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speechlm_ext.errors import CheckpointError, TrainingError
from speechlm_ext.model.files.digests import verify_digests, write_digests
from speechlm_ext.model.files.model_folder import write_model_files
from speechlm_ext.model.files.weights import read_tensors
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.training.engine import from_rank_0
from speechlm_ext.training.optimizer_state import MOMENTS, gather_state
from speechlm_ext.utils.files.checkpoint_folders import (
    STATE_NAME,
    checkpoint_name,
    incomplete_name,
    list_checkpoints,
    point_latest,
    publish,
    recover,
    remove,
    step_of,
)
from speechlm_ext.utils.files.io import atomic_path, atomic_write_json, make_folder, storage_error
from speechlm_ext.utils.files.json_shape import SIZE, Range, check_shape, read_shaped
from speechlm_ext.utils.files.run_folders import MODEL_FILES, TOKENIZERS_NAME, WEIGHTS_NAME
from speechlm_ext.utils.finite import first_not_finite, is_finite, require_finite

OPTIMIZER_NAME = "optimizer.safetensors"
#: Every file of a checkpoint, besides the tokenizers' and the digests.
FILES = (*MODEL_FILES, OPTIMIZER_NAME, STATE_NAME)
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


def save_checkpoint(engine: Any, model: SpeechLMModel, state: TrainerState, root: Path, keep: int) -> Path:
    """Write ``root/step-…``, remove all but the newest ``keep`` checkpoints, and return the new folder.

    All ranks call it, rank 0 writes; ``state`` gets AdamW's step counter.

    Raises:
        TrainingError: a weight or moment is not finite, on every rank; older checkpoints are untouched.
        StorageError: the disk is full or not writable; older checkpoints are untouched.
    """
    weights, moments, optimizer_step = gather_state(engine, model)
    folder = root / checkpoint_name(state.step)
    problem: Exception | None = None
    if torch.distributed.get_rank() == 0:
        state.optimizer_step = optimizer_step
        try:
            found = first_not_finite(weights) or first_not_finite(moments)
            if found is not None:
                raise diverged(root, state.step, f"of the weights and moments, {found} is not finite")
            _write(folder, model, weights, moments, state)
            prune(root, state.step, keep)
        except Exception as error:
            problem = error
    problem = from_rank_0(problem)
    if problem is not None:
        raise problem
    return folder


def prune(root: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step``; later ones, of a run that went back, stay."""
    found = [p for p in list_checkpoints(root) if (step_of(p) or 0) <= step]
    for old in found[: max(0, len(found) - keep)]:
        remove(old)


def _write(
    folder: Path,
    model: SpeechLMModel,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: TrainerState,
) -> None:
    temporary = incomplete_name(folder)
    try:
        make_folder(folder.parent)
        recover(folder.parent)
        temporary.mkdir()
        write_model_files(model, weights, temporary)
        with atomic_path(temporary / OPTIMIZER_NAME) as path:
            save_file(moments, path)
        atomic_write_json(temporary / STATE_NAME, asdict(state))
        write_digests(temporary, FILES, (TOKENIZERS_NAME,))
        publish(folder)
        point_latest(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    except SafetensorError as error:
        raise storage_error(OSError(5, str(error)), folder) from error
    finally:
        # Gone after publish(); anything else is half-written.
        shutil.rmtree(temporary, ignore_errors=True)


def diverged(root: Path, step: int, reason: str) -> TrainingError:
    """The error of a run whose numbers are not finite any more; it names the checkpoints in ``root`` to resume from."""
    found = list_checkpoints(root)
    good = next((folder for folder in reversed(found) if _is_finite_on_disk(folder)), None)
    bad = [folder.name for folder in found if good is None or (step_of(folder) or 0) > (step_of(good) or 0)]
    if good is None:
        left = f"There is no checkpoint with finite values in {root}"
    else:
        left = f"The newest checkpoint with finite values is {good}; the same command resumes from it"
        older = [folder for folder in found[: found.index(good)] if _is_finite_on_disk(folder)]
        if older:
            left += f"; if it stops there again, resume from the one before it with --resume {older[-1]}"
    if bad:
        left += f" (delete {', '.join(bad)}, which cannot be used)"
    return TrainingError(
        f"training stopped at step {step}: {reason}; nothing of it was saved. {left}. Lower optimizer.lr, lengthen "
        "optimizer.warmup_steps, or use precision fp32."
    )


def _is_finite_on_disk(folder: Path) -> bool:
    try:
        for name in (WEIGHTS_NAME, OPTIMIZER_NAME):
            with safe_open(folder / name, framework="pt") as file:
                if not all(is_finite(file.get_tensor(key)) for key in file.keys()):  # noqa: SIM118
                    return False
    except (OSError, SafetensorError):
        return False
    return True


def verify_files(folder: Path) -> None:
    """Compare a checkpoint's files with their digests. Raises :class:`CheckpointError`."""
    verify_digests(folder, FILES, (TOKENIZERS_NAME,))


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


def load_weights(model: SpeechLMModel, folder: Path) -> dict[str, Tensor]:
    """Copy a checkpoint's weights to ``model``, before the engine is built; returns them for the fp32 masters.

    Raises:
        CheckpointError: missing, damaged, not finite, or of other shapes.
    """
    named = dict(model.named_parameters())
    weights = _read_tensors(folder / WEIGHTS_NAME, {name: p.shape for name, p in named.items()})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    return weights


def read_moments(model: SpeechLMModel, folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's moments, ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of every parameter, before the engine is
    built.

    Raises:
        CheckpointError: the optimizer file is missing, damaged, not finite, or of another model.
    """
    shapes = {f"{key}.{name}": p.shape for name, p in model.named_parameters() for key in MOMENTS}
    return _read_tensors(folder / OPTIMIZER_NAME, shapes)


def _read_tensors(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The finite tensors of exactly these names and shapes."""
    tensors = read_tensors(path, "use an older checkpoint.")
    found = {name: tensor.shape for name, tensor in tensors.items()}
    odd = next((name for name in [*shapes, *found] if shapes.get(name) != found.get(name)), None)
    if odd is not None:
        sizes = [list(group[odd]) if odd in group else "none" for group in (shapes, found)]
        raise CheckpointError(
            f"{path} does not fit the model of this configuration but another model: expected {odd!r} of shape "
            f"{sizes[0]}, got {sizes[1]}. Use the run's own settings (config.yaml in its folder)."
        )
    hint = (
        "The run had diverged when it was saved: resume from an older checkpoint (--resume PATH), or delete this one, "
        "so that the same command takes the one before it."
    )
    require_finite(tensors, CheckpointError, f"{path} cannot be resumed from", hint)
    return tensors
