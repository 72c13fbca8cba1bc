"""The tiny training runs that the tests compare, and two processes that do them all.

Loading DeepSpeed takes longer than six tiny steps, so torchrun starts two processes once (``drive.py``): they do the
runs of two processes, and the first of them then does those of one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from speechlm_ext.model import FrameTransformerConfig


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: run folder below the root.
        changes: of the settings in ``tiny.py``.
        stop_at: step behind which the run ends as by a crash.
        kill_at: the same by SIGKILL, in a process of its own.
        breaks_at: backward pass in which the last rank's gradient overflows; the loss does not.
        attention: kernel of packed rows, instead of the one that is chosen.
        partition: with ZeRO-3, partition small parameters too, as those of a real model are.
        unseen: all ranks but the first do not see the checkpoint.
        error: name of the run, if it is expected to fail.
        tokens: token folder below the root.
    """

    folder: str
    changes: dict[str, Any] = field(default_factory=dict)
    stop_at: int | None = None
    kill_at: int | None = None
    breaks_at: int | None = None
    attention: str | None = None
    partition: bool = False
    unseen: bool = False
    error: str | None = None
    tokens: str = "tokens"


MULTISCALE = {
    "data": {"delays": [0, 0, 0, 0]},
    "model": {
        "frame_transformer": FrameTransformerConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_size=12)
    },
}
#: Packs of one or two samples, so that some hold no frame that is learnt: recognition alone.
SMALL = {**MULTISCALE, "data": {**MULTISCALE["data"], "budget": 44}}
WAYS: dict[str, dict] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    **{f"zero{s}": {"zero_stage": s} for s in (1, 2, 3)},
}
MULTISCALE_WAYS = ("plain", "bf16", "zero1", "zero3")
#: Runs that diverge: on one process with every way, on two with these.
DIVERGING = {1: tuple(WAYS), 2: ("plain", "zero3")}
#: A few random utterances, which only the previous stream can tell apart.
BY_HEART = {
    "data": {"delays": [0, 0, 0, 0], "budget": 4096},
    "model": {
        "hidden_size": 32,
        "frame_transformer": FrameTransformerConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32),
    },
    "optimizer": {"lr": 1e-2, "warmup_steps": 10, "weight_decay": 0.0},
    "steps": 150,
    "save_every": 150,
}


#: Heads of sixteen, which the package's own attention takes.
WIDE = {"model": {"hidden_size": 32, "num_kv_heads": 1}, "steps": 30, "save_every": 30}


def on_two_processes() -> list[Run]:
    """Runs of two processes, with a pack each."""
    runs = [Run(f"two-processes-{s}", {"zero_stage": s}, stop_at=3) for s in (0, 1, 2, 3)]
    runs += [Run("partitioned", {"zero_stage": 3}, partition=True)]
    runs += [
        Run("partitioned-tied", {"zero_stage": 3, "steps": 3, "model": {"tie_head": True}}, partition=True)
    ]
    runs += diverging(2)
    runs += [Run("two-processes-1", {"zero_stage": 1}, unseen=True, error="unseen")]
    runs += [Run(f"multi-scale/two-processes-{s}", {**SMALL, "zero_stage": s}) for s in (0, 1, 2, 3)]
    return [*runs, Run("multi-scale/partitioned", {**SMALL, "zero_stage": 3}, partition=True)]


def on_one_process(root: Path) -> list[Run]:
    """Runs of one process. Those that resume others come last."""
    runs = [Run("killed", kill_at=4)]
    for name, changes in WAYS.items():
        runs += stopped_and_resumed(name, changes)
    for name in MULTISCALE_WAYS:
        runs += stopped_and_resumed(f"multi-scale/{name}", {**MULTISCALE, **WAYS[name]})
    falls = {"budget": 4096}
    runs += [
        Run("falls", {"data": falls, "steps": 12}),
        Run("multi-scale/falls", {**MULTISCALE, "data": {**MULTISCALE["data"], **falls}, "steps": 12}),
        Run("wide/packed", WIDE),
        Run("wide/eager", {**WIDE, "acceleration": "eager"}),
        Run("wide/sdpa", {**WIDE, "acceleration": "eager"}, attention="sdpa"),
        Run("multi-scale/recomputed", {**MULTISCALE, "activation_checkpointing": True}),
        Run("multi-scale/by-heart", BY_HEART, tokens="three-utterances"),
        Run("multi-scale/two-packs", {**SMALL, "accumulation": 2}),
        Run("two-packs", {"accumulation": 2, "save_every": 1, "keep_checkpoints": 2}),
        Run("two-packs-tied", {"accumulation": 2, "steps": 3, "model": {"tie_head": True}}),
        # Lines after steps 2, 4, 6 and a checkpoint after 3: the second line begins before it and ends behind it.
        Run("lines-resumed", {"log_every": 2}, stop_at=3),
        Run("lines-resumed", {"log_every": 2}),
        *(Run(f"two-processes-{s}", {"accumulation": 2}) for s in (1, 3)),
        Run("killed"),
        *diverging(1),
        *refused(root),
    ]
    huge = {"optimizer": {"lr": 1e30}, "save_every": 1, "keep_checkpoints": 1, "log_every": 10}
    good = root / "ruined" / "checkpoints" / "step-00000003"
    return [
        *runs,
        Run("ruined", stop_at=3),
        Run("ruined", huge, error="ruined"),
        Run("ruined", {"resume": str(good)}),
    ]


def stopped_and_resumed(name: str, changes: dict) -> list[Run]:
    """A run, and the same one stopped after step 3 and resumed."""
    return [Run(name, changes), Run(f"{name}-resumed", changes, stop_at=3), Run(f"{name}-resumed", changes)]


def diverging(world: int) -> list[Run]:
    """Runs that diverge: the loss overflows at step 2, or the gradient alone at step 5."""
    runs = []
    loss = {"optimizer": {"lr": 1e30, "warmup_steps": 1}, "save_every": 2, "log_every": 10}
    gradient = {"keep_checkpoints": 1, "log_every": 10}
    for way in DIVERGING[world]:
        for name, changes, breaks_at in (("loss", loss, None), ("gradient", gradient, 5)):
            folder = f"{name}-{world}-{way}"
            runs.append(Run(folder, {**WAYS[way], **changes}, breaks_at=breaks_at, error=folder))
    return runs


#: Part of the error of each run that cannot be started, by its name.
REFUSED = {
    "nowhere": "does not exist",
    "empty": "not a training checkpoint",
    "plan": "another pack plan",
    "width": "does not fit the model",
    "damaged": "optimizer.safetensors is damaged or truncated",
    "unverified": "damaged or truncated: use an older",
    "flipped": "model.safetensors is damaged or truncated",
    "old": "is not finite. The run had diverged",
    "exists": "already holds",
}
REFUSED_MULTISCALE = {
    "delays": "delays them by [0, 1, 2, 3]. Set data.delays to [0, 0, 0, 0]",
    "few-delays": "has 4 streams, so it takes as many delays; got [0, 0]",
    "no-frame": "does not fit the model",
    "other-plan": "another pack plan",
}


def refused(root: Path) -> list[Run]:
    """Runs that cannot be started, because of the checkpoint or the layout."""
    good = str(root / "two-processes-0" / "checkpoints" / "step-00000003")
    frames = str(root / "multi-scale" / "plain" / "checkpoints" / "step-00000006")
    delayed = {**MULTISCALE, "data": {}}
    cases: dict[str, dict] = {
        "nowhere": {"resume": str(root / "nowhere")},
        "empty": {"resume": str(root / "empty")},
        "plan": {"resume": good, "data": {"budget": 140}},
        "width": {"resume": good, "model": {"hidden_size": 32}},
        "damaged": {"resume": str(root / "damaged")},
        "unverified": {"resume": str(root / "damaged"), "verify": False},
        "flipped": {"resume": str(root / "flipped")},
        "old": {"resume": str(root / "old")},
        "exists": {"resume": "none"},
        "delays": delayed,
        "few-delays": {**delayed, "data": {"delays": [0, 0]}},
        "no-frame": {"data": {"delays": [0, 0, 0, 0]}, "resume": frames},
        "other-plan": {"resume": frames},
    }
    assert set(cases) == {*REFUSED, *REFUSED_MULTISCALE}
    return [
        Run("plain" if name == "exists" else "refused", changes, error=name)
        for name, changes in cases.items()
    ]


def damage_checkpoints(root: Path) -> None:
    """Make the checkpoints that are refused, of one that two processes left."""
    good = root / "two-processes-0" / "checkpoints" / "step-00000003"
    (root / "empty").mkdir()
    for name in ("damaged", "flipped", "old"):
        shutil.copytree(good, root / name)
    (root / "damaged" / "optimizer.safetensors").write_bytes(b"\x10\0\0\0")
    flipped = bytearray((good / "model.safetensors").read_bytes())
    flipped[-2] ^= 1
    (root / "flipped" / "model.safetensors").write_bytes(flipped)
    # As an older version would have saved it.
    (root / "old" / "digests.json").unlink()
    broken = {name: value / 0 for name, value in load_file(good / "model.safetensors").items()}
    save_file(broken, root / "old" / "model.safetensors")


def damage_killed(run_dir: Path) -> None:
    """Keep a copy of a killed run as it is, and leave in it what a kill at other moments would."""
    shutil.copytree(run_dir, run_dir.with_name("killed-then"), symlinks=True)
    (run_dir / "checkpoints" / ".incomplete-step-00000009").mkdir()
    with open(run_dir / "log.jsonl", "a") as file:  # a cut line must not confuse the resumed run
        file.write('{"step": 5, "lo')


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(run_dir)], dtype=torch.float64)


def norms(run_dir: Path) -> torch.Tensor:
    return torch.tensor([line["grad_norm"] for line in lines(run_dir)], dtype=torch.float64)


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step-*"))[-1]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(run_dir) / "model.safetensors")


def errors(root: Path, world: int) -> dict[str, str]:
    """Errors of the runs that had to fail, by their names."""
    return json.loads((root / f"errors-{world}.json").read_text())
