"""Decisions that the processes of a run share, so that none waits for one that has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import distributed

from speechlm_ext.errors import SpeechLMError, TrainingError


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if distributed.get_world_size() > 1:
        distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Block that ends on every rank or raises on every rank: a rank's own error, or the lowest rank's elsewhere.

    Ranks must not wait for each other inside it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if distributed.get_world_size() > 1:
        rank = distributed.get_rank()
        mine = error
        if error is not None and not isinstance(error, SpeechLMError):
            mine = TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")
        every: list[Exception | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, mine)
        error = error or next((other for other in every if other is not None), None)
    if error is not None:
        raise error
