"""Checks of a transformers configuration before a model is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 10_000


def check_num_layers(settings: Mapping[str, Any]) -> None:
    """Refuse an absurd number of layers, which would take forever to build. Raises ``ValueError``."""
    for key, value in settings.items():
        if "layer" in key and isinstance(value, int) and abs(value) > MAX_LAYERS:
            raise ValueError(f"{key} is {str(value)[:40]}, more than {MAX_LAYERS}")
