"""The training loop: one optimizer step learns from ``accumulation · world`` packs.

The loss of a step is the weighted sum over all its tokens, divided by the weight of all its tokens on all
processes. So the gradient does not depend on how packs are spread over micro-batches and processes.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from speechlm_ext.data.loader import PackLoader
from speechlm_ext.errors import SpeechLMError, TrainingError
from speechlm_ext.model import SpeechLMModel
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.config import TrainConfig
from speechlm_ext.training.engine import from_rank_0, gradient_norm
from speechlm_ext.training.log import RunLog
from speechlm_ext.training.meter import Meter

logger = logging.getLogger("speechlm_ext")


class TrainLoop:
    """Takes the steps of a run, from ``state`` to its last; ``loader`` is at the state's place in the data, and
    ``root`` is the folder of checkpoints. ``state`` and ``meter`` change as the run proceeds."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Any,
        model: SpeechLMModel,
        loader: PackLoader,
        *,
        state: ckpt.TrainerState,
        meter: Meter,
        log: RunLog,
        root: Path,
    ) -> None:
        self.config, self.engine, self.model, self.loader = config, engine, model, loader
        self.state, self.meter, self.log, self.root = state, meter, log, root
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.packs = iter(loader)
        self.started = time.perf_counter() - state.seconds
        self.saved: Path | None = None
        self.saved_step = state.step
        self.is_proven = True
        """Whether a later step with the weights saved last has had a finite loss and gradient."""

    def run(self) -> Path | None:
        """Take all steps; returns the last checkpoint's folder, or None where no step is left.

        Raises:
            TrainingError: the loss, gradient or weights are not finite, on every rank.
            StorageError: a log line or checkpoint cannot be written.
        """
        config, state = self.config, self.state
        self.engine.train()
        while state.step < config.steps:
            lr = config.optimizer.lr_at(state.step, config.steps)
            loss, norm = self._step(lr)
            if not self.is_proven:
                self._prune()
                self.is_proven = True
            state.step += 1
            state.packs_consumed = self.loader.packs_consumed
            self.log.advance()
            is_last = state.step == config.steps
            if is_last or state.step % config.log_every == 0:
                self._write_line(loss, norm, lr)
            if is_last or state.step % config.save_every == 0:
                # Weights can be finite and ruined: older checkpoints go only when the next step is finite too.
                self._save(config.keep_checkpoints + 1)
                self.is_proven = False
        if not self.is_proven:
            self._prune()
        return self.saved

    def _step(self, lr: float) -> tuple[float, float | None]:
        """Take one optimizer step; returns its loss and, where it is known by then, the norm of its gradient."""
        engine, meter = self.engine, self.meter
        packs = [next(self.packs) for _ in range(self.config.accumulation)]
        facts = [self.model.facts(pack).to(meter.device) for pack in packs]
        batches = [pack.to(meter.device) for pack in packs]
        weight = torch.stack([b.loss_weight.sum() for b in batches]).double().sum()
        torch.distributed.all_reduce(weight)
        step_weight = max(float(weight), 1e-12)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        meter.start_step()
        for number, (batch, batch_facts) in enumerate(zip(batches, facts, strict=True), start=1):
            out = engine(
                batch.ids,
                batch.labels,
                batch.loss_weight,
                batch.position,
                batch.cu_seqlens,
                facts=batch_facts,
            )
            meter.add(out, step_weight, batch.ids.shape[0])
            # DeepSpeed divides by the accumulation and averages over processes; undo both.
            engine.backward(out.loss_sum * (self.config.accumulation * self.world / step_weight))
            if number == len(batches):
                norm, loss = gradient_norm(engine), meter.loss_of_step()
                if not math.isfinite(loss):
                    self._stop(f"the loss is {loss}")
                if norm is not None and not math.isfinite(norm):
                    self._stop(f"the loss is {loss:.4g}, but the norm of its gradient is {norm}")
            engine.step()
        if engine.skipped_steps:  # ZeRO takes no step, on any rank, where the gradient is not finite
            self._stop(f"the loss is {loss:.4g}, but its gradient is not finite")
        return loss, norm

    def _stop(self, reason: str) -> NoReturn:
        """End the run on every rank before a step is taken.

        Earlier steps are saved, and all older checkpoints stay: the newest may be ruined although it is finite.
        """
        self.meter.undo_step()
        if self.state.step > self.saved_step:
            try:
                self._save(keep=sys.maxsize)
            except SpeechLMError as error:  # the same on every rank; why the run ends matters more
                logger.warning("the step before it could not be saved: %s", error)
        raise self._diverged(self.state.step + 1, reason)

    def _diverged(self, step: int, reason: str) -> TrainingError:
        """The error for every rank. The others wait for rank 0, which reads the checkpoints that it names: where one
        process ends, torchrun ends all."""
        return from_rank_0(ckpt.diverged(self.root, step, reason) if self.rank == 0 else None)

    def _write_line(self, loss: float, norm: float | None, lr: float) -> None:
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        # DeepSpeed writes -1 for a norm that is not finite.
        if norm is None or not 0 <= norm < math.inf:
            raise self._diverged(
                self.state.step, f"the loss is {loss:.4g}, but the norm of its gradient is {norm}"
            )
        self.state.seconds = time.perf_counter() - self.started
        means = self.meter.means([stream.name for stream in self.loader.layout.streams])
        speed = means.pop("positions_per_second")
        self.log.write(
            {
                "step": self.state.step,
                **means,
                "lr": lr,
                "grad_norm": float(norm),
                "positions_per_second": speed,
                "packs_consumed": self.state.packs_consumed,
                "seconds": self.state.seconds,
            }
        )
        self.meter.reset()

    def _save(self, keep: int) -> None:
        state = self.state
        state.plan = self.loader.fingerprint
        state.seconds = time.perf_counter() - self.started
        gathered = self.meter.gather()
        state.meter = self.meter.to_state(gathered) if self.meter.num_steps else None
        self.saved = ckpt.save_checkpoint(self.engine, self.model, state, self.root, keep)
        self.saved_step = state.step
        if self.rank == 0:
            logger.info("saved %s", self.saved)

    def _prune(self) -> None:
        if self.rank == 0:
            ckpt.prune(self.root, self.saved_step, self.config.keep_checkpoints)
