"""The active requests side by side in slots ``0`` to ``n - 1``: the sampler's state of each, and the prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from speechlm_ext.generation.engine import sampler_state as states
from speechlm_ext.generation.engine.rows import forced_rows, partial_rows, prefix_rows
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.attention.kv_cache import KVCache
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.ops import DecodeState

#: Maximum number of rows of one prefill forward, which bounds its memory.
PREFILL_ROWS = 8192


@dataclass(eq=False)
class DecodeJob:
    """A prompt on its way through the engine."""

    key: Any
    """Names the job to the caller."""
    prompt: Prompt
    forced_target: np.ndarray | None = None
    """The target's content int64 ``[T, S]`` to force instead of sampling."""
    start_time: float = 0.0
    """``time.perf_counter()`` when it joined the engine."""


@dataclass(eq=False)
class Slot:
    """A row of the batch."""

    job: DecodeJob
    prefix_RS: np.ndarray
    """int64 ``[R, S]``: the rows that hold nothing but the prompt."""
    forced_RS: np.ndarray
    """int64 ``[R, S]``: the rows after the prefix that are known, -1 where a token is sampled."""
    leader: Slot | None = None
    """Of an unconditional row: the slot that it guides and whose tokens it copies."""

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Modalities of the request's targets."""
        return frozenset(s.modality for s in self.job.prompt.segments)

    @cached_property
    def prefix_key(self) -> bytes:
        """Equal for slots with equal prefixes."""
        return self.prefix_RS.tobytes()

    def max_rows(self, max_delay: int) -> int:
        """Upper bound on the rows after the prefix."""
        return max(len(self.forced_RS), sum(s.max_new + max_delay + 2 for s in self.job.prompt.segments))


def make_slots(job: DecodeJob, layout: TokenLayout) -> list[Slot]:
    """The slots that a job takes: one, and with guidance a second one without the conditions."""
    p = job.prompt
    if job.forced_target is None:
        forced_RS = partial_rows(p.frames_PS, layout)
    else:
        forced_RS = forced_rows(p, job.forced_target, layout)
    slot = Slot(job, prefix_rows(p.frames_PS, layout), forced_RS)
    if p.unconditional_PS is None:
        return [slot]
    return [slot, Slot(job, prefix_rows(p.unconditional_PS, layout), forced_RS, leader=slot)]


class SlotTable:
    """Slots in use, and one sampler state for all of them.

    Attributes:
        active: the slots in use, in order.
        columns: of the logits: the ids that any target so far can have.
    """

    def __init__(self, layout: TokenLayout, num_slots: int, device: torch.device) -> None:
        self.layout, self.num_slots, self.device = layout, num_slots, device
        self.active: list[Slot] = []
        self.columns = states.Columns(layout, [])
        self._state: DecodeState | None = None

    @property
    def state(self) -> DecodeState:
        """The sampler's state of ``num_slots`` rows; there is none before the first request."""
        assert self._state is not None
        return self._state

    def add(self, new: Sequence[Slot], max_rows: int) -> bool:
        """Append slots in their initial state.

        Args:
            max_rows: rows after the prefix that the state must hold for each.

        Returns:
            Whether the state's memory was replaced.
        """
        before, first = self._state, len(self.active)
        self.active += new
        modalities = self.columns.modalities.union(*(slot.modalities for slot in new))
        if modalities != self.columns.modalities:
            self.columns = states.Columns(self.layout, modalities)
            prompts = [slot.job.prompt for slot in self.active]
            self._state = states.with_columns(before, prompts, self.columns, self.num_slots, self.device)
        prompts, forced = [slot.job.prompt for slot in new], [slot.forced_RS for slot in new]
        segments = max(len(prompt.segments) for prompt in prompts)
        self._state = states.resized(self.state, self.num_slots, segments, max(map(len, forced)), max_rows)
        fresh = states.new_state(prompts, self.columns, forced, self.device)
        for row in range(len(new)):
            states.put(self.state, first + row, fresh, row)
        self.link()
        return self._state is not before

    def remove(self, number: int) -> int:
        """Free a slot; the last one takes its place. Call :meth:`link` afterwards. Returns the last one's number."""
        last = len(self.active) - 1
        if number != last:
            for name in states.ROWS:
                rows = getattr(self.state, name)
                rows[number] = rows[last]
            self.active[number] = self.active[last]
        self.state.done[last] = 1
        self.active.pop()
        return last

    def link(self) -> None:
        """Set which row of the logits each slot reads, and which one guides it."""
        state, n = self.state, len(self.active)
        state.source[:n] = torch.arange(n, device=self.device)
        state.guide[:n] = -1
        for number, slot in enumerate(self.active):
            if slot.leader is not None:
                leader = self.active.index(slot.leader)
                for row in (number, leader):
                    state.source[row], state.guide[row] = leader, number


def prefill(
    model: SpeechLMModel,
    cache: KVCache,
    slots: Mapping[int, Slot],
    active: Sequence[Slot],
    num_cached: int = 0,
    each_alone: bool = True,
) -> None:
    """Fill the cache with all prefix rows of new slots but the last, which the next step feeds.

    Args:
        slots: the new slots by number.
        active: the slots before them, whose prefixes are in the cache and can be copied.
        num_cached: leading rows of the first new slot that its cache has already.
        each_alone: a forward for each prefix, so that its bits do not depend on the others; else they are packed.
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
    for batch in [[one] for one in pending] if each_alone else _batches(pending):
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
