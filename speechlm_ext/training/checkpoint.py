"""Checkpoints: one folder that trains on, generates, serves and goes to the Hub.

A checkpoint is a model folder (fp32 weights) plus ``optimizer.safetensors`` and ``trainer_state.json``. The
optimizer's moments are stored per parameter, gathered from DeepSpeed's partitions, so a run goes on with
another number of processes or another ZeRO stage, and nothing is ever unpickled. A folder appears under its
final name only when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechlm_ext.errors import CheckpointError
from speechlm_ext.model.config import CONFIG_NAME
from speechlm_ext.model.speechlm import TOKENIZERS_NAME, WEIGHTS_NAME, SpeechLM
from speechlm_ext.utils.io import atomic_write_json, storage_error

STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
LATEST = "latest"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainerState:
    """All that a run needs besides weights and moments."""

    step: int = 0
    """Optimizer steps done."""
    packs_consumed: int = 0
    """Packs that all processes together have learnt from: the loader's whole state."""
    optimizer_step: float = 0.0
    """AdamW's own step counter, which its bias correction uses."""
    plan: str = ""
    """Fingerprint of the pack plan that ``packs_consumed`` counts in."""
    seconds: float = 0.0
    """Training time so far, in seconds."""
    totals: dict[str, float] = field(default_factory=dict)
    """Running sums for the log: positions and tokens seen."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and (p / STATE_NAME).is_file())


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The innermost torch optimizer, below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def _is_partitioned(engine: Any) -> bool:
    return not isinstance(engine.optimizer, torch.optim.Optimizer)


def _full_parameter(engine: Any, parameter: Tensor) -> Tensor:
    if not _is_partitioned(engine):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _full_moment(engine: Any, parameter: Tensor, key: str) -> Tensor:
    if not _is_partitioned(engine):
        return _torch_optimizer(engine).state[parameter][key]
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, key)


def _link_moments(engine: Any) -> None:
    """Let every parameter find its moments.

    DeepSpeed's ZeRO 1 and 2 link them once, after the first group's first step, when later groups have none yet.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _step_counters(engine: Any) -> list[Tensor]:
    states = _torch_optimizer(engine).state.values()
    return [state["step"] for state in states if "step" in state]


def save_checkpoint(engine: Any, model: SpeechLM, state: TrainerState, root: Path, keep: int) -> Path:
    """Write ``root/step-…``; all ranks call it, rank 0 writes.

    Args:
        engine: the DeepSpeed engine.
        model: its module.
        state: where the run stands.
        root: folder of checkpoints.
        keep: how many of the newest are kept.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: the disk is full or not writable; older checkpoints are untouched.
    """
    rank = torch.distributed.get_rank()
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    _link_moments(engine)
    for name, parameter in model.named_parameters():
        # Gathering is collective: every rank takes part, rank 0 keeps the result.
        full = _full_parameter(engine, parameter)
        parts = {key: _full_moment(engine, parameter, key) for key in MOMENTS}
        if rank == 0:
            weights[name] = full.detach().float().cpu().clone().contiguous()
            for key, value in parts.items():
                moments[f"{key}.{name}"] = value.detach().float().cpu().clone().contiguous()
    folder = root / checkpoint_name(state.step)
    problem: list[Exception | None] = [None]
    if rank == 0:
        counters = _step_counters(engine)
        state.optimizer_step = float(counters[0]) if counters else 0.0
        try:
            _write(folder, model, weights, moments, state)
            for old in list_checkpoints(root)[:-keep]:
                shutil.rmtree(old)
        except Exception as error:
            problem[0] = error
    torch.distributed.broadcast_object_list(problem) if torch.distributed.get_world_size() > 1 else None
    if problem[0] is not None:
        raise problem[0]
    return folder


def _write(
    folder: Path, model: SpeechLM, weights: dict[str, Tensor], moments: dict[str, Tensor], state: TrainerState
) -> None:
    temporary = folder.parent / f".incomplete-{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt", "layout": model.layout.sha256})
        save_file(moments, temporary / OPTIMIZER_NAME)
        model.layout.save(temporary)
        if model.tokenizers is not None:
            model.tokenizers.save(temporary / TOKENIZERS_NAME)
        atomic_write_json(temporary / CONFIG_NAME, model.config.to_dict())
        atomic_write_json(temporary / STATE_NAME, asdict(state))
        for path in (temporary / WEIGHTS_NAME, temporary / OPTIMIZER_NAME):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():  # a checkpoint of the same step from before a restart
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _point_latest(folder)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(OSError(28 if "No space" in str(error) else 5, str(error)), folder) from error
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(error, folder) from error


def _point_latest(folder: Path) -> None:
    """Let the link ``latest`` beside the checkpoint name it."""
    link = folder.parent / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, folder.parent / LATEST)


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
    try:
        return TrainerState(**json.loads(path.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an older checkpoint of the run.") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path.parent} has no {path.name}: it is incomplete; use an older one."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): damaged or truncated; use an older checkpoint."
        ) from None


def load_weights(model: SpeechLM, folder: Path) -> dict[str, Tensor]:
    """Put a checkpoint's weights into ``model`` (before the engine is built); returns them for the fp32 masters.

    Raises:
        CheckpointError: missing, damaged, or of other shapes.
    """
    weights = _load_tensors(folder / WEIGHTS_NAME)
    named = dict(model.named_parameters())
    if set(named) != set(weights) or any(named[n].shape != w.shape for n, w in weights.items()):
        odd = sorted(set(named) ^ set(weights)) or [
            n for n, w in weights.items() if named[n].shape != w.shape
        ]
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model of this configuration: first difference at {odd[0]!r}. "
            f"Use the run's own settings (config.yaml in its folder)."
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    return weights


def _make_moments(engine: Any) -> None:
    """Let ZeRO have its moments before the first step, which is when it would make them."""
    inner = _torch_optimizer(engine)
    # The flat fp32 partitions of ZeRO 1 and 2, and those of ZeRO 3.
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for flat in getattr(engine.optimizer, name, ()):
            inner.state[flat] = {
                "step": torch.tensor(0.0),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
    _link_moments(engine)


def load_optimizer(
    engine: Any, model: SpeechLM, folder: Path, weights: dict[str, Tensor], state: TrainerState
) -> None:
    """Put a checkpoint's moments, step counter and fp32 masters into a fresh engine; all ranks call it.

    Raises:
        CheckpointError: the optimizer file is missing, damaged or of another model.
    """
    moments = _load_tensors(folder / OPTIMIZER_NAME)
    inner = _torch_optimizer(engine)
    _make_moments(engine)
    for name, parameter in model.named_parameters():
        parts = {key: moments.get(f"{key}.{name}") for key in MOMENTS}
        if any(value is None for value in parts.values()):
            raise CheckpointError(
                f"{folder / OPTIMIZER_NAME} has no moments for {name!r}: it belongs to another model."
            )
        if not _is_partitioned(engine):
            inner.state[parameter] = {
                "step": torch.tensor(state.optimizer_step),
                **{
                    key: value.to(parameter.device).clone()
                    for key, value in parts.items()
                    if value is not None
                },
            }
            continue
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, weights[name])
        for key, value in parts.items():
            safe_set_full_optimizer_state(parameter, value, key)
    for counter in _step_counters(engine):
        counter.fill_(state.optimizer_step)
