"""The outcome of one part of a check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """Outcome of one part: ``passed``, ``failed``, ``skipped`` (with the reason) or ``timeout``."""

    status: str
    seconds: float = 0.0
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)
