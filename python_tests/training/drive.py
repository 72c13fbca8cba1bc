"""Does the runs of ``runs.py`` and the comparisons of ``partitioned.py``; torchrun starts it on two processes.

``python -m python_tests.training.drive ROOT``: runs and token folders are below ROOT, and ``errors-1.json`` and
``errors-2.json`` hold the errors of those runs that had to fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from torch import distributed

from python_tests.training import partitioned
from python_tests.training.runs import (
    Run,
    damage_checkpoints,
    damage_killed,
    on_one_process,
    on_two_processes,
)
from python_tests.training.tiny import config, make_tokens
from speechlm_ext.errors import CheckpointError, SpeechLMError
from speechlm_ext.model.attention import kernels
from speechlm_ext.model.backbone import body
from speechlm_ext.training import checkpoint, run_train
from speechlm_ext.training.engine import import_deepspeed
from speechlm_ext.training.log import RunLog

WRITE = RunLog.write
deepspeed = import_deepspeed()
CHOOSE = kernels.choose_attention
INITIALIZE = deepspeed.initialize
READ_STATE = checkpoint.read_state
RANK = int(os.environ["RANK"])


class _Stop(Exception):
    """Ends a run as a crash would, right after a step."""


def partition_everything(model=None, config=None, **more):  # type: ignore[no-untyped-def]
    """deepspeed.initialize that partitions small parameters too, as ZeRO-3 does with a real model's."""
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    made = INITIALIZE(model=model, config=config, **more)
    assert model.embedding.weight.numel() == 0, "the table is not partitioned"
    return made


def breaking(number: int):  # type: ignore[no-untyped-def]
    """deepspeed.initialize, for a run in whose ``number``-th backward pass the last rank's gradient overflows; the loss
    does not."""

    def initialize(model=None, **more):  # type: ignore[no-untyped-def]
        calls = 0

        def overflow(gradient):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            is_last = distributed.get_rank() == distributed.get_world_size() - 1
            return gradient * float("inf") if calls == number and is_last else gradient

        model.head.weight.register_hook(overflow)
        return INITIALIZE(model=model, **more)

    return initialize


def unseen(folder: Path) -> checkpoint.TrainerState:
    raise CheckpointError(f"checkpoint {folder} does not exist.")


def do(root: Path, run: Run) -> str | None:
    """Do one run; returns its error's class and text."""
    deepspeed.initialize = partition_everything if run.partition else INITIALIZE
    if run.breaks_at:
        deepspeed.initialize = breaking(run.breaks_at)
    kernels.choose_attention = CHOOSE if run.attention is None else lambda *_: (run.attention, "a test")
    body.choose_attention = kernels.choose_attention
    checkpoint.read_state = unseen if run.unseen and RANK > 0 else READ_STATE

    def write(log, row):  # type: ignore[no-untyped-def]
        if run.stop_at is not None and row["step"] > run.stop_at:
            raise _Stop
        WRITE(log, row)
        if row["step"] == run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.write = write
    try:
        run_train(config(root / run.folder, root / run.tokens, run.changes))
    except _Stop:
        return None
    except SpeechLMError as error:
        return f"{type(error).__name__}: {error}"
    return None


def do_all(root: Path, world: int, runs: list[Run]) -> None:
    """Do runs one after the other, each as expected, and keep the errors of those that had to fail."""
    failed = {}
    for run in runs:
        if run.kill_at:
            assert in_fork(lambda run=run: do(root, run)) == signal.SIGKILL
            damage_killed(root / run.folder)
            continue
        error = do(root, run)
        assert (error is None) == (run.error is None), f"{run}: {error}"
        if run.error is not None:
            failed[run.error] = error
    if RANK == 0:
        (root / f"errors-{world}.json").write_text(json.dumps(failed))


def in_fork(work: Callable[[], object]) -> int:
    """Do ``work`` in a fork of this process, with a process group of its own; returns the signal that ended it."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a fork failed; its error is above"
    return os.WTERMSIG(status)


def main(root: Path) -> None:
    def two() -> None:
        do_all(root, 2, on_two_processes())
        deepspeed.initialize = INITIALIZE
        partitioned.main(root)

    def one() -> None:
        for name in [n for n in os.environ if n.startswith(("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_"))]:
            del os.environ[name]  # as without torchrun
        do_all(root, 1, on_one_process(root))

    if RANK == 0:
        make_tokens(root / "three-utterances", num=3, seed=3)
    assert in_fork(two) == 0
    if RANK == 0:
        damage_checkpoints(root)
        assert in_fork(one) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
