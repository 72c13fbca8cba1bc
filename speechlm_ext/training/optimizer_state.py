"""Weights and AdamW moments of a DeepSpeed engine, whole whatever ZeRO has partitioned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechlm_ext.model.lm import SpeechLMModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_state(engine: Any, model: SpeechLMModel) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Weights by name, moments by ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, and AdamW's step counter.

    All in float32 on the CPU of rank 0; the dicts of other ranks are empty. All ranks call it.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    _link_moments(engine)
    for name, parameter in model.named_parameters():
        # Gathering is collective: every rank takes part, rank 0 keeps the result.
        weight, *parts = _gather(engine, parameter)
        if torch.distributed.get_rank() == 0:
            weights[name] = _copy(weight)
            moments.update({f"{key}.{name}": _copy(part) for key, part in zip(MOMENTS, parts, strict=True)})
    counters = _step_counters(engine)
    return weights, moments, float(counters[0]) if counters else 0.0


def load_optimizer(
    engine: Any,
    model: SpeechLMModel,
    moments: dict[str, Tensor],
    weights: dict[str, Tensor],
    optimizer_step: float,
) -> None:
    """Set moments, step counter and fp32 masters of a new engine from a checkpoint; all ranks call it."""
    inner = _torch_optimizer(engine)
    # ZeRO would create its moments in its first step: the flat fp32 partitions of ZeRO 1 and 2, and those of ZeRO 3.
    for group in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for flat in getattr(engine.optimizer, group, ()):
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {"step": torch.tensor(0.0), **zeros}
    _link_moments(engine)
    for name, parameter in model.named_parameters():
        parts = {key: moments[f"{key}.{name}"] for key in MOMENTS}
        if not _is_partitioned(engine):
            inner.state[parameter] = {
                "step": torch.tensor(optimizer_step),
                **{key: value.to(parameter.device).clone() for key, value in parts.items()},
            }
            continue
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, weights[name])
        for key, value in parts.items():
            safe_set_full_optimizer_state(parameter, value, key)
    for counter in _step_counters(engine):
        counter.fill_(optimizer_step)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The innermost torch optimizer, below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def _is_partitioned(engine: Any) -> bool:
    return not isinstance(engine.optimizer, torch.optim.Optimizer)


def _gather(engine: Any, parameter: Tensor) -> list[Tensor]:
    """A parameter and its moments, whole."""
    if not _is_partitioned(engine):
        state = _torch_optimizer(engine).state[parameter]
        return [parameter, *(state[key] for key in MOMENTS)]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parts = [safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
    return [safe_get_full_fp32_param(parameter), *parts]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def _link_moments(engine: Any) -> None:
    """Link every parameter to its moments.

    DeepSpeed's ZeRO 1 and 2 link them once, after the first group's first step, when later groups have none yet.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _step_counters(engine: Any) -> list[Tensor]:
    states = _torch_optimizer(engine).state.values()
    return [state["step"] for state in states if "step" in state]
