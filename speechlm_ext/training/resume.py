"""The checkpoint that a run resumes from: rank 0 chooses, and every rank must see the same."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import torch

from speechlm_ext.errors import CheckpointError
from speechlm_ext.training import checkpoint as ckpt
from speechlm_ext.training.config import TrainConfig
from speechlm_ext.training.engine import from_rank_0, raise_on_all_ranks
from speechlm_ext.utils.files.checkpoint_folders import latest_checkpoint, recover, step_of
from speechlm_ext.utils.files.run_folders import find_model_folder

logger = logging.getLogger("speechlm_ext")


def find_resume(config: TrainConfig, root: Path) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        CheckpointError: a named checkpoint does not exist, or a new run would overwrite an old one.
    """
    newest = latest_checkpoint(root)
    if config.resume == "auto":
        return newest
    if config.resume == "none":
        if newest is not None:
            raise CheckpointError(
                f"run folder {config.run_dir} already holds {newest.name}, but resume is 'none'. Choose another "
                f"run_dir, delete it, or resume with --resume auto."
            )
        return None
    chosen = find_model_folder(config.resume)
    step = step_of(chosen.resolve())
    if newest is not None and step is not None and step < (step_of(newest) or 0):
        logger.warning(
            "going back to %s: %s in %s is newer and stays, and without --resume this run would resume from it; delete "
            "it if it is not wanted",
            chosen,
            newest.name,
            root,
        )
    return chosen


def agree_on_resume(config: TrainConfig, root: Path) -> tuple[Path | None, ckpt.TrainerState]:
    """Checkpoint and state that the run resumes from, chosen by rank 0 and seen by all.

    Raises:
        CheckpointError: on every rank: the checkpoint cannot be resumed from, or a rank sees another one.
    """
    rank = torch.distributed.get_rank()
    resume, state = None, ckpt.TrainerState()
    with raise_on_all_ranks():
        if rank == 0:
            if root.is_dir():
                recover(root)
            resume = find_resume(config, root)
            state = state if resume is None else ckpt.read_state(resume)
    resume, state = from_rank_0((resume, state))
    with raise_on_all_ranks():
        if resume is None:
            return None, state
        if rank > 0:
            _require_seen(resume, state, rank)
        if config.verify:
            ckpt.verify_files(resume)
    return resume, state


def _require_seen(resume: Path, state: ckpt.TrainerState, rank: int) -> None:
    try:
        seen = ckpt.read_state(resume)
    except CheckpointError as error:
        reason = str(error)
    else:
        if seen == state:
            return
        reason = f"it sees one of step {seen.step}."
    raise CheckpointError(
        f"rank {rank} (on {socket.gethostname()}) does not see the checkpoint {resume} of step {state.step} that rank "
        f"0 resumes from: {reason} Put run_dir where all processes see the same files."
    )
