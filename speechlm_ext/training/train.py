"""A training run from its settings to its last checkpoint.

A run resumes exactly: its state is the weights, the moments and the number of packs consumed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.errors import CheckpointError, ConfigError, StorageError
from speechlm_ext.model import SpeechLMModel
from speechlm_ext.model.attention.kernels import choose_attention
from speechlm_ext.model.backbone.acceleration import accelerate, choose_acceleration
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.config import TrainConfig, to_yaml
from speechlm_ext.training.engine import build_engine, raise_on_all_ranks
from speechlm_ext.training.launch import init_distributed, launch, set_threads
from speechlm_ext.training.log import RunLog
from speechlm_ext.training.loop import TrainLoop
from speechlm_ext.training.meter import Meter
from speechlm_ext.training.optimizer_state import load_optimizer
from speechlm_ext.training.resume import agree_on_resume
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.run_folders import CHECKPOINTS

logger = logging.getLogger("speechlm_ext")


def build_model(config: TrainConfig, loader: PackLoader) -> SpeechLMModel:
    """The model of a run, with its initial weights.

    Raises:
        ConfigError: the model cannot be built, or the longest sample exceeds its positions.
        CheckpointError: the backbone cannot be loaded.
    """
    settings = config.model
    torch.manual_seed(config.seed)
    model_config = replace(settings.model_config(), tasks=tuple(loader.tasks))
    model = SpeechLMModel(model_config, loader.layout, loader.tokenizers)
    if settings.backbone is not None:
        model.load_backbone(settings.backbone)
        logger.info("backbone %s: %s", settings.backbone, model.describe_backbone())
    if config.activation_checkpointing:
        model.backbone.gradient_checkpointing_enable()
        if model.frame is not None:
            model.frame.body.gradient_checkpointing_enable()
    if config.data.budget > model.max_positions and loader.max_length > model.max_positions:
        raise ConfigError(
            f"the longest sample has {loader.max_length} frames, but the model takes {model.max_positions} "
            f"(model.max_positions). Raise it, or drop longer samples."
        )
    return model


def _activation_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def describe_acceleration(config: TrainConfig, device: torch.device, layers: str, why: str) -> str:
    """What computes a run's layers, as :func:`accelerate` has said, and its attention, each with the reason."""
    attention, reason = choose_attention(device, _activation_dtype(config))
    return f"layers: {layers} ({why})  attention: {attention} ({reason})"


def run_train(config: TrainConfig) -> Path:
    """Train as configured; returns the last checkpoint's folder.

    Raises:
        SpeechLMError: settings, data or checkpoint cannot be used; a run that should resume never starts at step 0.
        TrainingError: the loss, gradient or weights are not finite, on every rank; the step is not saved.
    """
    if config.processes > 1 and "RANK" not in os.environ:
        return launch(config)
    rank, world, device = init_distributed()
    threads = set_threads(config)
    run_dir = Path(config.run_dir)
    root = run_dir / CHECKPOINTS
    resume, state = agree_on_resume(config, root)
    with raise_on_all_ranks():
        loader = PackLoader(config.data, rank=rank, world=world, packs_consumed=state.packs_consumed)
        if resume is not None and state.plan != loader.fingerprint:
            raise CheckpointError(
                f"checkpoint {resume} was trained with another pack plan ({state.plan[:12]}, now "
                f"{loader.fingerprint[:12]}): token folders, tasks, factors, budget or seed differ, so its place in "
                f"the data means nothing here. Use the run's own data settings (config.yaml), or start a new run_dir."
            )
        model = build_model(config, loader)
        weights = moments = None
        meter = Meter(len(loader.layout.streams), device)
        if resume is not None:
            loader.layout.require_same(
                type(loader.layout).load(resume), "the token folder", f"checkpoint {resume}"
            )
            weights = ckpt.load_weights(model, resume)
            moments = ckpt.read_moments(model, resume)
            meter.restore(state.meter, str(resume / ckpt.STATE_NAME))
        model.to(device)
        choice, why = choose_acceleration(device, _activation_dtype(config), config.acceleration)
        runs_with = accelerate(model.backbone, choice)
    engine = build_engine(model, config)
    if weights is not None and moments is not None:
        load_optimizer(engine, model, moments, weights, state.optimizer_step)
        del weights, moments
    with raise_on_all_ranks():
        if rank == 0:
            atomic_write_text(run_dir / "config.yaml", to_yaml(config))
            loader.layout.save(run_dir)
        log = RunLog(run_dir, state.step, config.steps, rank == 0, config.tensorboard)
    if rank == 0:
        logger.info(
            "%s  %.2f M parameters  layout %s  %d process(es) x %d thread(s)  %s  %s",
            f"resuming at step {state.step} from {resume}" if resume else "new run",
            model.num_parameters() / 1e6,
            loader.layout,
            world,
            threads,
            f"ZeRO {config.zero_stage} {config.precision}",
            describe_acceleration(config, device, runs_with, why),
        )
    try:
        loop = TrainLoop(config, engine, model, loader, state=state, meter=meter, log=log, root=root)
        last = loop.run()
    except BaseException:
        with contextlib.suppress(StorageError):  # of the same full disk; the first error says why
            log.close()
        raise
    log.close()
    return last or resume or root / ckpt.checkpoint_name(state.step)
