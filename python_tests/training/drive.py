"""Do a list of training runs in a process of its own; the tests start it, also under torchrun.

``drive.py TOKENS JSON RESULTS``: the JSON is a list of settings that differ from the tiny ones, each with ``run_dir``.
What became of each run is written to the file RESULTS as a JSON list: null, or the error's class and text.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tiny import config  # noqa: E402

from speechlm_ext.errors import CheckpointError, SpeechLMError  # noqa: E402
from speechlm_ext.model import FrameTransformerConfig  # noqa: E402
from speechlm_ext.training import OptimizerSettings, checkpoint, run_train, train  # noqa: E402
from speechlm_ext.training.engine import import_deepspeed  # noqa: E402

WRITE_LINE = train._write_line
deepspeed = import_deepspeed()
INITIALIZE = deepspeed.initialize
READ_STATE = checkpoint.read_state
RANK = int(os.environ.get("RANK", "0"))


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
            last = RANK == int(os.environ["WORLD_SIZE"]) - 1
            return gradient * float("inf") if calls == number and last else gradient

        model.head.weight.register_hook(overflow)
        return INITIALIZE(model=model, **more)

    return initialize


def unseen(folder: Path) -> checkpoint.TrainerState:
    raise CheckpointError(f"checkpoint {folder} does not exist.")


def do(tokens: Path, changes: dict) -> str | None:
    deepspeed.initialize = partition_everything if changes.pop("partition", False) else INITIALIZE
    if "breaks_at" in changes:
        deepspeed.initialize = breaking(changes.pop("breaks_at"))
    checkpoint.read_state = unseen if changes.pop("unseen", False) and RANK > 0 else READ_STATE
    tie_head = changes.pop("tie_head", False)
    stop_at, slow = changes.pop("stop_at", None), changes.pop("slow", 0)
    budget, hidden = changes.pop("budget", None), changes.pop("hidden_size", None)
    delays, frame = changes.pop("delays", None), changes.pop("frame_transformer", None)
    optimizer = OptimizerSettings(**changes.pop("optimizer")) if "optimizer" in changes else None
    settings = config(Path(changes.pop("run_dir")), tokens, **changes)
    if budget:
        settings = replace(settings, data=replace(settings.data, budget=budget))
    settings = replace(settings, model=replace(settings.model, tie_head=tie_head))
    if optimizer:
        settings = replace(settings, optimizer=optimizer)
    if delays:
        settings = replace(settings, data=replace(settings.data, delays=delays))
    if frame:
        settings = replace(
            settings, model=replace(settings.model, frame_transformer=FrameTransformerConfig(**frame))
        )
    if hidden:
        settings = replace(settings, model=replace(settings.model, hidden_size=hidden))

    def write_line(log, meter, norm, names, state, lr):  # type: ignore[no-untyped-def]
        if stop_at is not None and state.step > stop_at:
            raise _Stop
        WRITE_LINE(log, meter, norm, names, state, lr)
        time.sleep(slow)

    train._write_line = write_line
    try:
        run_train(settings)
    except _Stop:
        return None
    except SpeechLMError as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    results = [do(Path(sys.argv[1]), changes) for changes in json.loads(sys.argv[2])]
    if RANK == 0:  # ranks that share a pipe would write into each other's lines
        Path(sys.argv[3]).write_text(json.dumps(results))
