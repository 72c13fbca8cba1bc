"""A tiny token folder and run settings, so that training tests take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.data.plan.plan import PlanConfig
from speechlm_ext.data.samples import TaskUse
from speechlm_ext.data.tokens.format import write_index, write_shard
from speechlm_ext.data.tokens.index import shard_name
from speechlm_ext.layout import TokenLayout
from speechlm_ext.training import ModelSettings, OptimizerSettings, TrainConfig


def make_tokens(folder: Path, num: int = 24, seed: int = 0) -> Path:
    """Write a token folder of ``num`` random utterances with S = 4 streams."""
    rng = np.random.default_rng(seed)
    layout = TokenLayout.build(ssl=12, codec=[8] * 3, text=20)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num):
        frames = int(rng.integers(5, 30))
        rows.append(
            {
                "id": f"u{i}",
                "dataset": "tiny",
                "speaker": "a",
                "lang": "en",
                "text": "x",
                "duration": frames / 50,
                "text_bpe": rng.integers(0, 20, (int(rng.integers(2, 8)), 1)).astype(np.int32),
                "ssl": rng.integers(0, 12, (frames, 1)).astype(np.int32),
                "codec": rng.integers(0, 8, (frames, 3)).astype(np.int32),
            }
        )
    layout.save(folder)
    write_shard(folder / shard_name(0), rows, layout)
    write_index(folder, layout, 1)
    return folder


def config(run_dir: Path, tokens: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Six steps of a two-layer model on packs of 128 rows; ``changes`` are nested as in a recipe."""
    settings = TrainConfig(
        run_dir=str(run_dir),
        data=PlanConfig(
            tokens=[str(tokens)], tasks=[TaskUse("codec_ssl_asr"), TaskUse("codec_ssl_plain_tts")], budget=128
        ),
        model=ModelSettings(hidden_size=16, num_layers=2, num_heads=2, ffn_size=32, max_positions=256),
        optimizer=OptimizerSettings(lr=3e-3, warmup_steps=2, clip=0.3),
        steps=6,
        save_every=3,
        log_every=1,
        threads=1,
        tensorboard=False,
    )
    return changed(settings, changes or {})


def changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """``settings``, with other values in it and in the dataclasses in it."""
    values = {}
    for name, value in changes.items():
        old = getattr(settings, name)
        values[name] = changed(old, value) if is_dataclass(old) and isinstance(value, Mapping) else value
    return replace(settings, **values)
