"""The training loop: one optimizer step learns from ``accumulation · world`` packs.

The loss of a step is the weighted sum over all its tokens, divided by the weight of all its tokens on all
processes. So the gradient does not depend on how packs are spread over micro-batches and processes, and a
run goes on exactly after a stop: its state is the weights, the moments and the number of packs consumed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.errors import CheckpointError, ConfigError, SpeechLMError, StorageError, TrainingError
from speechlm_ext.model import ModelConfig, SpeechLMModel
from speechlm_ext.model.backbone.body import backbone_settings
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.config import TrainConfig
from speechlm_ext.training.engine import build_engine, gradient_norm, init_distributed, set_threads
from speechlm_ext.training.log import RunLog
from speechlm_ext.training.meter import CORRECT, COUNT, LOSS, WEIGHT, Meter
from speechlm_ext.training.ranks import from_rank_0, together
from speechlm_ext.training.resume import agree_on_resume, find_resume
from speechlm_ext.utils.files.checkpoint_folders import latest_checkpoint, recover
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.run_folders import CHECKPOINTS

logger = logging.getLogger("speechlm_ext")


def build_model(config: TrainConfig, loader: PackLoader) -> SpeechLMModel:
    """The model of a run, with its initial weights."""
    settings = config.model
    backbone = settings.llama() if settings.backbone is None else backbone_settings(settings.backbone)
    torch.manual_seed(config.seed)
    model = SpeechLMModel(
        ModelConfig(
            backbone,
            tuple(loader.tasks),
            settings.loss,
            settings.tie_head,
            settings.heads,
            settings.frame_transformer,
            settings.verify_backbone,
        ),
        loader.layout,
        loader.tokenizers,
    )
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


def run_train(config: TrainConfig) -> Path:
    """Train as ``config`` says and return the last checkpoint's folder.

    Raises:
        SpeechLMError: settings, data or checkpoint that cannot be used; nothing is started from zero silently.
        TrainingError: the loss, gradient or weights are not finite, on every rank; nothing of it is saved.
    """
    if config.processes > 1 and "RANK" not in os.environ:
        return _launch(config)
    rank, world, device = init_distributed()
    threads = set_threads(config)
    run_dir = Path(config.run_dir)
    root = run_dir / CHECKPOINTS
    resume, state = agree_on_resume(config, root)
    with together():
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
    engine = build_engine(model, config)
    if weights is not None and moments is not None:
        ckpt.load_optimizer(engine, model, moments, weights, state)
        del weights, moments
    with together():
        if rank == 0:
            atomic_write_text(
                run_dir / "config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
            )
            loader.layout.save(run_dir)
        log = RunLog(run_dir, state.step, config.steps, rank == 0, config.tensorboard)
    if rank == 0:
        logger.info(
            "%s  %.2f M parameters  layout %s  %d process(es) x %d thread(s)  %s",
            f"resuming at step {state.step} from {resume}" if resume else "new run",
            model.num_parameters() / 1e6,
            loader.layout,
            world,
            threads,
            f"ZeRO {config.zero_stage} {config.precision}",
        )
    try:
        last = _loop(engine, model, loader, config, state, meter, log, root, device)
    except BaseException:
        with contextlib.suppress(StorageError):  # of the same full disk; the first error says why
            log.close()
        raise
    log.close()
    return last or resume or root / ckpt.checkpoint_name(state.step)


def _launch(config: TrainConfig) -> Path:
    """Start ``config.processes`` processes of this very run through torchrun and wait for them."""
    run_dir = Path(config.run_dir)
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < config.processes:
        raise ConfigError(
            f"processes is {config.processes}, but this machine has {devices} GPU(s); each process needs one of "
            f"its own. Set --processes {devices}."
        )
    root = run_dir / CHECKPOINTS
    if root.is_dir():
        recover(root)
    find_resume(config, root)  # fail before anything is started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False), "utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={config.processes}",
            "-m",
            "speechlm_ext.cli",
            "train",
            "--config",
            str(path),
        ]
        code = subprocess.run(command, check=False).returncode
    newest = latest_checkpoint(root)
    if code != 0 or newest is None:
        left = (
            f"the newest checkpoint is {newest}"
            if newest is not None
            else f"there is no checkpoint in {root}"
        )
        raise TrainingError(
            f"a training process ended with exit code {code}; its message is above. Of this run {left}."
        )
    return newest


def _loop(
    engine: Any,
    model: SpeechLMModel,
    loader: PackLoader,
    config: TrainConfig,
    state: ckpt.TrainerState,
    meter: Meter,
    log: RunLog,
    root: Path,
    device: torch.device,
) -> Path | None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = [stream.name for stream in loader.layout.streams]
    packs = iter(loader)
    begun = time.perf_counter() - state.seconds
    last, saved_step = None, state.step
    is_proven = True  # whether what was saved last has given a loss and a gradient that are finite

    def save(keep: int) -> None:
        nonlocal last, saved_step
        state.plan = loader.fingerprint
        state.seconds = time.perf_counter() - begun
        gathered = meter.gather()
        state.meter = meter.to_state(gathered) if meter.num_steps else None
        last, saved_step = ckpt.save_checkpoint(engine, model, state, root, keep), state.step
        if rank == 0:
            logger.info("saved %s", last)

    def prune() -> None:
        if rank == 0:
            ckpt.prune(root, saved_step, config.keep_checkpoints)

    def refuse(what: str) -> NoReturn:
        """End on every rank before a step is taken. What was learnt until then is kept, and so is all that is older: it
        may be good no longer, although it is finite."""
        meter.undo_step()
        if state.step > saved_step:
            try:
                save(keep=sys.maxsize)
            except SpeechLMError as error:  # the same on every rank; why the run ends matters more
                logger.warning("the step before it could not be saved: %s", error)
        raise _diverged(root, state.step + 1, what)

    engine.train()
    while state.step < config.steps:
        batches = [next(packs).to(device) for _ in range(config.accumulation)]
        weight = torch.stack([b.loss_weight.sum() for b in batches]).double().sum()
        if world > 1:
            torch.distributed.all_reduce(weight)
        step_weight = max(float(weight), 1e-12)
        lr = config.optimizer.lr_at(state.step, config.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        meter.start_step()
        for number, batch in enumerate(batches, start=1):
            out = engine(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens)
            meter.add(out, step_weight, batch.ids.shape[0])
            # DeepSpeed divides by the accumulation and averages over processes; undo both.
            engine.backward(out.loss_sum * (config.accumulation * world / step_weight))
            if number == len(batches):
                norm = gradient_norm(engine)
                loss = meter.loss_of_step()
                if not math.isfinite(loss):
                    refuse(f"the loss is {loss}")
                if norm is not None and not math.isfinite(norm):
                    refuse(f"the loss is {loss:.4g}, but the norm of its gradient is {norm}")
            engine.step()
        if engine.skipped_steps:  # ZeRO takes no step, on any rank, where the gradient is not finite
            refuse(f"the loss is {loss:.4g}, but its gradient is not finite")
        if not is_proven:
            prune()
            is_proven = True
        state.step += 1
        state.packs_consumed = loader.packs_consumed
        log.advance()
        if state.step % config.log_every == 0 or state.step == config.steps:
            norm = engine.get_global_grad_norm() if norm is None else norm
            # DeepSpeed writes -1 for a norm that is not finite.
            if norm is None or not 0 <= norm < math.inf:
                raise _diverged(
                    root, state.step, f"the loss is {loss:.4g}, but the norm of its gradient is {norm}"
                )
            state.seconds = time.perf_counter() - begun
            _write_line(log, meter, float(norm), names, state, lr)
            meter.reset()
        if state.step % config.save_every == 0 or state.step == config.steps:
            # Weights can be finite and ruined: what is older goes only when the next step's numbers are finite too.
            save(config.keep_checkpoints + 1)
            is_proven = False
    if not is_proven:
        prune()
    return last


def _diverged(root: Path, step: int, what: str) -> TrainingError:
    """The error for every rank. Rank 0 looks for the checkpoints that it names, and the others wait for it: where one
    process ends, torchrun ends all."""
    return from_rank_0(ckpt.diverged(root, step, what) if torch.distributed.get_rank() == 0 else None)


def _write_line(
    log: RunLog, meter: Meter, grad_norm: float, names: list[str], state: ckpt.TrainerState, lr: float
) -> None:
    seconds = time.perf_counter() - meter.started
    sums = meter.gather().sum(0)
    loss, positions = float(sums[0]) / meter.num_steps, int(sums[1])
    streams = sums[2:].view(4, len(names))
    # A stream that nothing was learnt of in the interval has no mean.
    live = [(n, *column.tolist()) for n, column in zip(names, streams.T, strict=True) if column[COUNT] > 0]
    total = float(streams[LOSS].sum())
    mean = {n: part[LOSS] / part[WEIGHT] for n, *part in live}
    row = {
        "step": state.step,
        "loss": loss,
        "stream_loss": mean,
        "stream_accuracy": {n: part[CORRECT] / part[COUNT] for n, *part in live},
        "stream_share": {n: part[LOSS] / total if total else 0.0 for n, *part in live},
        "lr": lr,
        "grad_norm": grad_norm,
        "positions_per_second": positions / seconds,
        "packs_consumed": state.packs_consumed,
        "seconds": state.seconds,
    }
    shown = "  ".join(f"{n} {v:.2f}" for n, v in list(mean.items())[:3])
    rest = list(mean.values())[3:]
    tail = f"  … {rest[-1]:.2f}" if rest else ""
    log.write(row, f"loss {loss:.3f}  {shown}{tail}  lr {lr:.1e}  {positions / seconds:,.0f} positions/s")


def _plain(value: Any) -> Any:
    """Plain YAML types: tuples become lists, paths strings."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
