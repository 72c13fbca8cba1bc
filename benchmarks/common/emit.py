"""Rows of figures on their way to whoever asked for them.

A program that measures hands over each row as soon as it has it. Standard output belongs to people and to libraries
that print; so a check that starts such programs names a file in ``SPEECHLM_ROWS``, and rows go there, one line of JSON
each.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

VARIABLE = "SPEECHLM_ROWS"


def emit(row: dict[str, Any]) -> None:
    """Append a row to the file that ``SPEECHLM_ROWS`` names; without one, print it."""
    line = json.dumps(_finite(row), default=str)
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        print(line, flush=True)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
