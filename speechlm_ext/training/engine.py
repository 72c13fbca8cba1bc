"""DeepSpeed set up for speech language models, on CPU (gloo) as on GPU (NCCL).

Notable choices: torch's AdamW is handed to DeepSpeed, so that no operator is compiled at run time; the
learning rate is a pure function of the step; parameters are grouped into decayed matrices and the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from speechlm_ext.errors import ConfigError, SpeechLMError, TrainingError
from speechlm_ext.training.config import TrainConfig


def import_deepspeed() -> Any:
    """Import DeepSpeed for the device at hand.

    Raises:
        ConfigError: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_DISABLE_CONFIG_PRINT", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"training needs DeepSpeed, which cannot be imported ({error}): pip install 'speechlm_ext[train]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise DeepSpeed compiles a shared-memory all-reduce for CPUs at its first start (minutes, and files in the
    # home folder); gloo does the same job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of the body are decayed; tables, head, norms, biases and stream vectors are not.

    A table's row is touched only when its id occurs: decay would shrink rare ids towards zero.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        body_matrix = parameter.ndim >= 2 and name.startswith(("backbone.", "frame."))
        body_matrix = body_matrix and name != "frame.stream_embed"
        (decayed if body_matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_engine(model: nn.Module, config: TrainConfig) -> Any:
    """Wrap ``model`` in a DeepSpeed engine with torch's AdamW."""
    deepspeed = import_deepspeed()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    world = torch.distributed.get_world_size()
    # bf16 needs fp32 masters, which DeepSpeed keeps well only in its ZeRO optimizers; stage 1 gives the same result.
    stage = max(config.zero_stage, 1) if config.precision == "bf16" else config.zero_stage
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": config.accumulation * world,
        # Clipping to the global norm; the loss is already the mean over all that the step learns.
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if world == 1 and stage == 0:
        # One process has the whole gradient: without this it is copied into buckets and back.
        engine.enable_backward_allreduce = False
    return engine


def gradient_norm(engine: Any) -> float | None:
    """Norm of the whole gradient before clipping, called right before ``engine.step()``; None with ZeRO.

    Without ZeRO the gradients are whole and summed over the processes by then. ZeRO computes the norm in its step:
    ``engine.get_global_grad_norm()`` has it afterwards.
    """
    if engine.zero_optimization():
        return None
    parts = [torch.linalg.vector_norm(p.grad) for p in engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if distributed.get_world_size() > 1:
        distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Block that ends on every rank or raises on every rank: a rank's own error, or the lowest rank's elsewhere.

    Ranks must not wait for each other inside it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if distributed.get_world_size() > 1:
        rank = distributed.get_rank()
        mine = error
        if error is not None and not isinstance(error, SpeechLMError):
            mine = TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")
        every: list[Exception | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, mine)
        error = error or next((other for other in every if other is not None), None)
    if error is not None:
        raise error
