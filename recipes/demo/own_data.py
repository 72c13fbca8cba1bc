"""A user's own folder of recordings as the demo's train and test manifests.

The folder holds ``train.jsonl`` and ``test.jsonl``, or one ``manifest.jsonl`` of which 5 % (1 to 100 utterances) are
held out by a fixed draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speechlm_ext.data.manifest import Utterance, read_manifest
from speechlm_ext.errors import ConfigError, ManifestError
from speechlm_ext.utils.files.io import atomic_write_json, atomic_write_text
from speechlm_ext.utils.files.json_text import json_line

HELD_OUT = 0.05
MAX_HELD_OUT = 100


def prepare_own(folder: Path, out: Path) -> str:
    """Write ``train.jsonl``, ``test.jsonl`` and ``about.json`` into ``out``; returns a summary on one line.

    Raises:
        ConfigError: no manifest in the folder.
        ManifestError: a manifest is invalid, or has no utterance with text and audio to hold out.
    """
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if train.is_file() and test.is_file():
        splits = {"train": read_manifest(train), "test": read_manifest(test)}
        how = "the folder's own train.jsonl and test.jsonl"
    elif (folder / "manifest.jsonl").is_file():
        splits = split(read_manifest(folder / "manifest.jsonl"), folder)
        how = f"{len(splits['test'])} of manifest.jsonl's utterances drawn at random are held out"
    else:
        raise ConfigError(
            f"{folder} holds no manifest.jsonl (nor train.jsonl and test.jsonl). Write one JSON object per line: "
            '{"id": "a1", "audio": "a1.wav", "text": "the words of it", "lang": "en"}; audio paths are relative to it.'
        )
    for name, utterances in splits.items():
        lines = (json_line(_row(u)) for u in utterances)
        atomic_write_text(out / f"{name}.jsonl", "".join(lines))
    atomic_write_json(out / "about.json", {"own": folder.name, "how": how, "counts": _counts(splits)})
    return f"{len(splits['train'])} utterances to train on, {len(splits['test'])} to test: {how}"


def split(utterances: list[Utterance], folder: Path) -> dict[str, list[Utterance]]:
    """Hold out a fixed random part of the utterances that have text and audio."""
    eligible = [i for i, u in enumerate(utterances) if u.audio is not None and u.text]
    if len(eligible) < 2:
        raise ManifestError(
            f"{folder / 'manifest.jsonl'} has {len(eligible)} utterances with both audio and text; at least 2 are "
            "needed, one to train on and one to test."
        )
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT * len(eligible))))
    held = set(np.random.default_rng(0).permutation(eligible)[:count].tolist())
    return {
        "train": [u for i, u in enumerate(utterances) if i not in held],
        "test": [u for i, u in enumerate(utterances) if i in held],
    }


def _row(u: Utterance) -> dict[str, Any]:
    row = {
        "id": u.id,
        "audio": None if u.audio is None else str(u.audio),
        "text": u.text,
        "speaker": u.speaker,
        "lang": u.lang,
        "dataset": u.dataset,
        "start": u.start,
        "duration": u.duration,
    }
    return {k: v for k, v in row.items() if v is not None}


def _counts(splits: dict[str, list[Utterance]]) -> list[dict[str, Any]]:
    table = []
    for name, utterances in splits.items():
        for dataset, lang in sorted({(u.dataset, u.lang or "") for u in utterances}):
            group = [u for u in utterances if (u.dataset, u.lang or "") == (dataset, lang)]
            known = [u.duration for u in group if u.duration is not None]
            minutes = round(sum(known) / 60, 2) if len(known) == len(group) else None
            table.append(
                {"split": name, "dataset": dataset, "lang": lang, "count": len(group), "minutes": minutes}
            )
    return table
