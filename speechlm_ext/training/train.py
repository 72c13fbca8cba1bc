"""The training loop: one optimizer step learns from ``accumulation · world`` packs.

The loss of a step is the weighted sum over all its tokens, divided by the weight of all its tokens on all
processes. So the gradient does not depend on how packs are spread over micro-batches and processes, and a
run goes on exactly after a stop: its state is the weights, the moments and the number of packs consumed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.errors import CheckpointError, ConfigError
from speechlm_ext.model import ModelConfig, SpeechLM
from speechlm_ext.model.folder import find_model_folder
from speechlm_ext.model.speechlm import backbone_settings
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.config import TrainConfig
from speechlm_ext.training.engine import build_engine, init_distributed, set_threads
from speechlm_ext.training.log import RunLog
from speechlm_ext.utils.io import atomic_write_text

logger = logging.getLogger("speechlm_ext")
CHECKPOINTS = "checkpoints"


def build_model(config: TrainConfig, loader: PackLoader) -> SpeechLM:
    """The model of a run, with its initial weights."""
    settings = config.model
    backbone = settings.llama() if settings.backbone is None else backbone_settings(settings.backbone)
    torch.manual_seed(config.seed)
    model = SpeechLM(
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


def find_resume(config: TrainConfig, root: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        CheckpointError: a named checkpoint is not there, or a new run would overwrite an old one.
    """
    found = ckpt.list_checkpoints(root)
    if config.resume == "auto":
        return found[-1] if found else None
    if config.resume == "none":
        if found:
            raise CheckpointError(
                f"run folder {config.run_dir} already holds {found[-1].name}, but resume is 'none'. Choose another "
                f"run_dir, delete it, or go on with --resume auto."
            )
        return None
    return find_model_folder(config.resume)


class _Meter:
    """Sums of the log interval, kept on the device and reduced once per line."""

    def __init__(self, num_streams: int, device: torch.device) -> None:
        self.sums = torch.zeros(4, num_streams, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.positions = 0
        self.started = time.perf_counter()

    def add(self, out: Any, step_weight: float, positions: int) -> None:
        self.loss += out.loss_sum.detach().double() / step_weight
        self.sums += torch.stack(
            [
                t.detach().double()
                for t in (out.stream_loss, out.stream_weight, out.stream_count, out.stream_correct)
            ]
        )
        self.positions += positions

    def reduce(self) -> tuple[float, Tensor, int]:
        packed = torch.cat(
            (self.loss.view(1), self.loss.new_tensor([float(self.positions)]), self.sums.flatten())
        )
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(packed)
        return float(packed[0]), packed[2:].view_as(self.sums).cpu(), int(packed[1])


def run_train(config: TrainConfig) -> Path:
    """Train as ``config`` says and return the last checkpoint's folder.

    Raises:
        SpeechLMError: settings, data or checkpoint that cannot be used; nothing is started from zero silently.
    """
    if config.processes > 1 and "RANK" not in os.environ:
        return _launch(config)
    rank, world, device = init_distributed()
    threads = set_threads(config)
    run_dir = Path(config.run_dir)
    root = run_dir / CHECKPOINTS
    resume = find_resume(config, root)
    state = ckpt.TrainerState() if resume is None else ckpt.read_state(resume)

    loader = PackLoader(config.data, rank=rank, world=world, packs_consumed=state.packs_consumed)
    if resume is not None and state.plan != loader.fingerprint:
        raise CheckpointError(
            f"checkpoint {resume} was trained with another pack plan ({state.plan[:12]}, now "
            f"{loader.fingerprint[:12]}): token folders, tasks, factors, budget or seed differ, so its place in the "
            f"data means nothing here. Use the run's own data settings (config.yaml), or start a new run_dir."
        )
    model = build_model(config, loader)
    weights = None
    if resume is not None:
        loader.layout.require_same(
            type(loader.layout).load(resume), "the token folder", f"checkpoint {resume}"
        )
        weights = ckpt.load_weights(model, resume)
    model.to(device)
    engine = build_engine(model, config)
    if resume is not None and weights is not None:
        ckpt.load_optimizer(engine, model, resume, weights, state)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(run_dir / "config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
        loader.layout.save(run_dir)
        logger.info(
            "%s  %.2f M parameters  layout %s  %d process(es) x %d thread(s)  %s",
            f"resuming at step {state.step} from {resume}" if resume else "new run",
            model.num_parameters() / 1e6,
            loader.layout,
            world,
            threads,
            f"ZeRO {config.zero_stage} {config.precision}",
        )
    log = RunLog(run_dir, state.step, config.steps, rank == 0, config.tensorboard)
    try:
        last = _loop(engine, model, loader, config, state, log, root, device)
    finally:
        log.close()
    return last or root / ckpt.checkpoint_name(state.step)


def _launch(config: TrainConfig) -> Path:
    """Start ``config.processes`` processes of this very run through torchrun and wait for them."""
    run_dir = Path(config.run_dir)
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < config.processes:
        raise ConfigError(
            f"processes is {config.processes}, but this machine has {devices} GPU(s); each process needs one of "
            f"its own. Set --processes {devices}."
        )
    find_resume(config, run_dir / CHECKPOINTS)  # fail before anything is started
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
    found = ckpt.list_checkpoints(run_dir / CHECKPOINTS)
    if code != 0 or not found:
        raise CheckpointError(
            f"a training process ended with exit code {code}; its message stands above. What was saved in "
            f"{run_dir / CHECKPOINTS} is intact; the same command goes on from there."
        )
    return found[-1]


def _loop(
    engine: Any,
    model: SpeechLM,
    loader: PackLoader,
    config: TrainConfig,
    state: ckpt.TrainerState,
    log: RunLog,
    root: Path,
    device: torch.device,
) -> Path | None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = [stream.name for stream in loader.layout.streams]
    packs = iter(loader)
    meter = _Meter(len(names), device)
    begun = time.perf_counter() - state.seconds
    last = None
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
        for batch in batches:
            out = engine(batch.ids, batch.labels, batch.loss_weight, batch.position, batch.cu_seqlens)
            # DeepSpeed divides by the accumulation and averages over processes; undo both.
            engine.backward(out.loss_sum * (config.accumulation * world / step_weight))
            engine.step()
            meter.add(out, step_weight, batch.ids.shape[0])
        state.step += 1
        state.packs_consumed = loader.packs_consumed
        log.advance()
        if state.step % config.log_every == 0 or state.step == config.steps:
            state.seconds = time.perf_counter() - begun
            _write_line(log, meter, engine, names, state, lr)
            meter = _Meter(len(names), device)
        if state.step % config.save_every == 0 or state.step == config.steps:
            state.plan = loader.fingerprint
            state.seconds = time.perf_counter() - begun
            last = ckpt.save_checkpoint(engine, model, state, root, config.keep_checkpoints)
            if rank == 0:
                logger.info("saved %s", last)
    return last


def _write_line(
    log: RunLog, meter: _Meter, engine: Any, names: list[str], state: ckpt.TrainerState, lr: float
) -> None:
    seconds = time.perf_counter() - meter.started
    interval_steps = state.step - int(state.totals.get("logged_step", 0))
    state.totals["logged_step"] = state.step
    loss_sum, sums, positions = meter.reduce()
    loss = loss_sum / max(1, interval_steps)
    stream_loss, stream_weight, stream_count, stream_correct = sums
    if not bool(torch.isfinite(sums).all()):
        raise ConfigError(
            f"the loss is not finite at step {state.step}. The last checkpoint is intact; lower optimizer.lr (now "
            f"{lr:.2e}), lengthen optimizer.warmup_steps, or use precision fp32."
        )
    live = stream_count > 0
    mean = {
        n: float(a / b) for n, a, b, ok in zip(names, stream_loss, stream_weight, live, strict=True) if ok
    }
    accuracy = {
        n: float(a / b) for n, a, b, ok in zip(names, stream_correct, stream_count, live, strict=True) if ok
    }
    norm = engine.get_global_grad_norm()
    row = {
        "step": state.step,
        "loss": loss,
        "stream_loss": mean,
        "stream_accuracy": accuracy,
        "stream_share": {
            n: float(a / stream_loss.sum()) for n, a, ok in zip(names, stream_loss, live, strict=True) if ok
        },
        "lr": lr,
        "grad_norm": None if norm is None else float(norm),
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
