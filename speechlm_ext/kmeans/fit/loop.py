"""The course of a fit: start, iterate, save the state, repeat for ``n_init`` starts; the step of ``partial_fit``."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from speechlm_ext.kmeans.fit.lloyd import assign_pass, lloyd_step
from speechlm_ext.kmeans.fit.minibatch import Batches, minibatch_step, update_stopping
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.fit.seeding import initial_centers, subsample
from speechlm_ext.kmeans.fit.state import Best, Checkpoint, State
from speechlm_ext.kmeans.settings import Settings

_LOG = logging.getLogger(__name__)
#: Seconds between log lines where there is no progress bar.
_LOG_SECONDS = 20.0


def fit_all_starts(
    data: Data,
    settings: Settings,
    *,
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 1,
    with_labels: bool = False,
) -> tuple[Best, Tensor | None]:
    """Fit or resume: the best start and, if ``with_labels``, its int32 labels of this rank's rows."""
    state = checkpoint.load(data.device) if checkpoint is not None else None
    if state is None:
        state = _start(data, settings, 0, None)
        _save(checkpoint, state)
    labels = best_labels = None
    if with_labels:
        labels = torch.full((data.source.num_rows,), -1, dtype=torch.int32, device=data.device)
    while state.run < settings.n_init:
        _iterate(data, settings, state, checkpoint, checkpoint_every)
        final = assign_pass(data, state.centers, labels_out=labels, name="k-means, final")
        if state.best is None or final.inertia < state.best.inertia:
            is_lloyd = settings.algorithm == "lloyd"
            state.best = Best(
                centers=state.centers,
                inertia=final.inertia,
                counts=final.counts,
                history=[*state.history, final.inertia] if is_lloyd else state.history,
                iterations=state.iteration,
                seen=final.counts.double() if is_lloyd else state.seen,
            )
            best_labels = None if labels is None else labels.clone()
        if state.run + 1 < settings.n_init:
            state = _start(data, settings, state.run + 1, state.best)
        else:
            state.run, state.done = settings.n_init, True
        _save(checkpoint, state)
    assert state.best is not None
    if labels is not None and best_labels is None:  # loaded from the checkpoint of a finished fit
        assign_pass(data, state.best.centers, labels_out=labels, name="k-means, labels")
        best_labels = labels
    return state.best, best_labels


def partial_step(data: Data, settings: Settings, state: State | None) -> tuple[State, float]:
    """One step with all rows, after a new start if ``state`` is None: the new state, the inertia before."""
    if state is None:
        centers = initial_centers(data, settings)
        seen = torch.zeros(settings.n_clusters, dtype=torch.float64, device=data.device)
        state = State(centers=centers, seen=seen)
    else:
        state = replace(state, centers=state.centers.to(data.device), seen=state.seen.to(data.device))
    rows = torch.cat([data.no_rows(), *(block for _, block in data.blocks())])
    numbers = torch.arange(rows.shape[0], device=data.device) + data.first_row
    step = minibatch_step(data, settings, state, rows, numbers)
    return state, step.inertia * data.num_usable


def _start(data: Data, settings: Settings, run: int, best: Best | None) -> State:
    candidates, size = data, settings.init_size
    if size is None and settings.algorithm == "minibatch":
        size = max(3 * settings.batch_size, 3 * settings.n_clusters)
    if size is not None and size < data.num_usable and isinstance(settings.init, str):
        candidates = subsample(data, size, seed=settings.random_state, purpose=f"init rows/{run}")
    centers = initial_centers(candidates, settings, run)
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
    unit = "it" if is_lloyd else "step"
    with tqdm(total=total, initial=state.iteration, desc=name, disable=hidden, unit=unit) as bar:
        last_log = time.monotonic()
        while not state.done:
            if is_lloyd:
                step = lloyd_step(data, state, max_iter=total, tolerance=tolerance)
            else:
                step = minibatch_step(data, settings, state, *batches.get(state.iteration))
                update_stopping(data, settings, state, step)
            bar.update()
            status = (
                f"inertia {state.history[-1]:.6g}, shift {step.shift:.3g}, "
                f"{'empty' if is_lloyd else 'reassigned'} {step.num_empty}"
            )
            bar.set_postfix_str(status, refresh=False)
            if hidden is None and bar.disable and time.monotonic() - last_log > _LOG_SECONDS:
                _LOG.info("%s: iteration %d, %s", name, state.iteration, status)  # stderr is a file: no bar
                last_log = time.monotonic()
            if state.done or state.iteration % checkpoint_every == 0:
                _save(checkpoint, state)


def _save(checkpoint: Checkpoint | None, state: State) -> None:
    if checkpoint is not None:
        checkpoint.save(state)
