"""Prefill: the keys and values of prompts, packed together, and equal prompts only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from speechlm_ext.generation.engine.slots import Slot
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.lm import SpeechLMModel

#: Maximum number of rows of one prefill forward, which bounds its memory.
PREFILL_ROWS = 8192


def prefill(
    model: SpeechLMModel,
    cache: KVCache,
    slots: Mapping[int, Slot],
    active: Sequence[Slot],
    num_cached: int = 0,
) -> None:
    """Fill the cache with all prefix rows of new slots but the last, which the next step feeds.

    Args:
        slots: the new slots by number.
        active: the slots before them, whose prefixes are in the cache and can be copied.
        num_cached: leading rows of the first new slot that its cache has already.
    """
    device = next(model.parameters()).device
    cached = {slot.prefix_key: number for number, slot in enumerate(active)}
    sources: dict[bytes, int] = {}
    pending: list[tuple[int, np.ndarray]] = []
    copies: list[tuple[int, int]] = []
    for number, slot in slots.items():
        start, num_cached = num_cached, 0
        rows_RS = slot.prefix_RS[start:-1]
        if len(rows_RS) == 0:
            continue
        if start == 0 and slot.prefix_key in cached:
            cache.copy(cached[slot.prefix_key], [number], len(rows_RS))
        elif slot.prefix_key in sources:
            copies.append((sources[slot.prefix_key], number))
        else:
            sources[slot.prefix_key] = number
            pending.append((number, rows_RS))
    for batch in _batches(pending):
        numbers, rows = zip(*batch, strict=True)
        ids_NS = torch.from_numpy(np.concatenate(rows)).to(device)
        model.prefill(ids_NS, cache, list(numbers), list(map(len, rows)))
    for source, number in copies:
        cache.copy(source, [number])


def _batches(pending: Sequence[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Consecutive slots of at most ``PREFILL_ROWS`` rows together; one of more has a batch of its own."""
    batch: list[tuple[int, np.ndarray]] = []
    total = 0
    for number, rows_RS in pending:
        if batch and total + len(rows_RS) > PREFILL_ROWS:
            yield batch
            batch, total = [], 0
        batch.append((number, rows_RS))
        total += len(rows_RS)
    if batch:
        yield batch
