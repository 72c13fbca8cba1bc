"""The course of a fit: start, iterate, keep the state on disk, judge, and the same again for ``n_init`` starts;
and the single step of ``partial_fit``."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from speechlm_ext.kmeans.fit.checkpoint import Checkpoint
from speechlm_ext.kmeans.fit.lloyd import lloyd_step, walk
from speechlm_ext.kmeans.fit.minibatch import Batches, judge_progress, minibatch_step
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.seeding import initial_centers, subsample
from speechlm_ext.kmeans.fit.state import Best, State, Step
from speechlm_ext.kmeans.settings import Settings

_LOG = logging.getLogger(__name__)
#: Where there is no bar, a line of log so often.
_LOG_SECONDS = 20.0


@dataclass
class Fitted:
    """The best of the starts."""

    best: Best
    labels: Tensor | None
    """int32 of this rank's rows, where they were wanted."""


def run_fit(
    data: Data,
    settings: Settings,
    *,
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 1,
    want_labels: bool = False,
) -> Fitted:
    """Fit, or go on from the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or of another fit.
        KMeansError: an init that does not fit the data.
        StorageError: the checkpoint cannot be written.
    """
    state = checkpoint.load(data.device) if checkpoint is not None else None
    if state is None:
        state = _start(data, settings, 0, None)
        _save(checkpoint, state)
    labels = _no_labels(data) if want_labels else None
    best_labels: Tensor | None = None
    while state.run < settings.n_init:
        _iterate(data, settings, state, checkpoint, checkpoint_every)
        final = walk(data, state.centers, labels_out=labels, what="k-means, final")
        if state.best is None or final.inertia < state.best.inertia:
            state.best = Best(
                centers=state.centers,
                inertia=final.inertia,
                counts=final.counts,
                history=[*state.history, final.inertia] if settings.algorithm == "lloyd" else state.history,
                iterations=state.iteration,
                seen=state.seen if settings.algorithm == "minibatch" else final.counts.double(),
            )
            if labels is not None:
                best_labels = labels.clone()
        if state.run + 1 < settings.n_init:
            state = _start(data, settings, state.run + 1, state.best)
        else:
            state.run, state.done = settings.n_init, True
        _save(checkpoint, state)
    assert state.best is not None
    if labels is not None and best_labels is None:  # taken from a finished checkpoint
        walk(data, state.best.centers, labels_out=labels, what="k-means, labels")
        best_labels = labels
    return Fitted(state.best, best_labels)


def partial_step(data: Data, settings: Settings, state: State | None) -> tuple[State, float]:
    """One mini-batch step with all the rows, which are held in memory.

    Args:
        state: to go on from; None: the start is chosen among the rows.

    Returns:
        The new state, and the inertia of the rows before the step, summed over all ranks.
    """
    s = settings
    if state is None:
        centers = initial_centers(data, s.n_clusters, s.init, seed=s.random_state, trials=s.n_local_trials)
        seen = torch.zeros(s.n_clusters, dtype=torch.float64, device=data.device)
        state = State(centers=centers, seen=seen)
    else:
        state = replace(state, centers=state.centers.to(data.device), seen=state.seen.to(data.device))
    empty = torch.empty(0, data.source.num_features, dtype=data.work_dtype, device=data.device)
    rows = torch.cat([empty, *(block for _, block in data.blocks())])
    numbers = torch.arange(rows.shape[0], device=data.device) + data.first_row
    step = minibatch_step(
        data, state, rows, numbers, seed=s.random_state, reassignment_ratio=s.reassignment_ratio
    )
    return state, step.inertia * data.num_usable


def _start(data: Data, settings: Settings, run: int, best: Best | None) -> State:
    given, size = data, settings.init_size
    if size is None and settings.algorithm == "minibatch":
        size = max(3 * settings.batch_size, 3 * settings.n_clusters)
    if size is not None and size < data.num_usable and isinstance(settings.init, str):
        given = subsample(data, size, seed=settings.random_state, purpose=f"init rows/{run}")
    centers = initial_centers(
        given,
        settings.n_clusters,
        settings.init,
        seed=settings.random_state,
        run=run,
        trials=settings.n_local_trials,
    )
    seen = torch.zeros(settings.n_clusters, dtype=torch.float64, device=data.device)
    return State(centers=centers, seen=seen, run=run, best=best)


def _iterate(
    data: Data, settings: Settings, state: State, checkpoint: Checkpoint | None, checkpoint_every: int
) -> None:
    """Take steps until the run is done."""
    is_lloyd = settings.algorithm == "lloyd"
    batches = Batches(data, min(settings.batch_size, data.num_rows), settings.random_state + state.run)
    total = settings.max_iter if is_lloyd else settings.max_iter * batches.per_epoch
    tolerance = settings.tol * data.mean_variance
    hidden = True if data.progress is False or data.ranks.rank else (None if data.progress is None else False)
    name = "k-means" if settings.n_init == 1 else f"k-means, start {state.run + 1} of {settings.n_init}"
    with tqdm(
        total=total, initial=state.iteration, desc=name, disable=hidden, unit="it" if is_lloyd else "step"
    ) as bar:
        logged = time.monotonic()
        while not state.done:
            if is_lloyd:
                step = lloyd_step(data, state, max_iter=settings.max_iter, tolerance=tolerance)
            else:
                step = _minibatch(data, settings, state, batches, total, tolerance)
            bar.update()
            told = (
                f"inertia {state.history[-1]:.6g}, shift {step.shift:.3g}, "
                f"{'empty' if is_lloyd else 'reassigned'} {step.num_empty}"
            )
            bar.set_postfix_str(told, refresh=False)
            if hidden is None and bar.disable and time.monotonic() - logged > _LOG_SECONDS:
                _LOG.info("%s: iteration %d, %s", name, state.iteration, told)  # stderr is a file: no bar
                logged = time.monotonic()
            if state.done or state.iteration % checkpoint_every == 0:
                _save(checkpoint, state)


def _minibatch(
    data: Data, settings: Settings, state: State, batches: Batches, max_steps: int, tolerance: float
) -> Step:
    block, numbers = batches.get(state.iteration)
    step = minibatch_step(
        data,
        state,
        block,
        numbers,
        seed=settings.random_state + state.run,
        reassignment_ratio=settings.reassignment_ratio,
    )
    judge_progress(
        data,
        state,
        step,
        batch_size=batches.batch_size,
        max_steps=max_steps,
        tolerance=tolerance,
        max_no_improvement=settings.max_no_improvement,
    )
    return step


def _save(checkpoint: Checkpoint | None, state: State) -> None:
    if checkpoint is not None:
        checkpoint.save(state)


def _no_labels(data: Data) -> Tensor:
    return torch.full((data.source.num_rows,), -1, dtype=torch.int32, device=data.device)
