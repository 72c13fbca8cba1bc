"""The sampler's state of prompts: columns of the logits, scopes, settings and lengths of every request.

Axes: B requests, G targets of a request, S streams, R forced rows, H rows of history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speechlm_ext.generation.requests.prompt import Prompt, Segment
from speechlm_ext.generation.requests.settings import SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops import DecodeState

#: The tensors of a state with a row for each request that a new request sets.
INPUTS = ("sampling", "choice", "limits", "request", "guidance", "progress", "forced")
#: All tensors with a row for each request. A history is written before it is read.
ROWS = (*INPUTS, "history", "history_logprob")


class Columns:
    """The ids of the logits' columns: per stream the union of the id ranges of some modalities.

    Columns ascend by id, so the first column among equals is the lowest id.

    Attributes:
        modalities: of the targets.
        ranges: per stream the id ranges, the end token among stream 0's.
        ids: per stream int64 ``[V_s]``; a stream that none of the modalities uses has the pad alone, which is never
            read.
    """

    def __init__(self, layout: TokenLayout, modalities: Iterable[str]) -> None:
        self.layout, self.modalities = layout, frozenset(modalities)
        unused = [(layout.pad_id, layout.pad_id + 1)]
        self.ranges = [stream or unused for stream in self.ranges_of(self.modalities)]
        self.ids = [torch.cat([torch.arange(a, b) for a, b in parts]) for parts in self.ranges]

    def ranges_of(self, modalities: Iterable[str]) -> list[list[tuple[int, int]]]:
        """Per stream the ascending id ranges of some modalities, the end token among stream 0's."""
        contents = [self.layout.content_ranges(m) for m in modalities]
        eos = {(self.layout.sos_eos_id, self.layout.sos_eos_id + 1)}
        return [
            sorted({r for c in contents if (r := c[s]) is not None} | (eos if s == 0 else set()))
            for s in range(self.layout.num_streams)
        ]

    def scope(self, modality: str) -> list[tuple[int, int]]:
        """Per stream the id range of ``modality``; (-1, -1) without content."""
        return [(-1, -1) if r is None else r for r in self.layout.content_ranges(modality)]


def new_state(
    prompts: Sequence[Prompt],
    columns: Columns,
    forced: Sequence[np.ndarray],
    device: torch.device,
) -> DecodeState:
    """The sampler's state before the first row of ``prompts``, with a history of one row (see :func:`resized`).

    Args:
        columns: of the logits; they hold every target's modality.
        forced: for each prompt the known rows int64 ``[R_b, S]``, -1 where a token is sampled.
    """
    layout, S = columns.layout, columns.layout.num_streams
    rows_BRS = np.full((len(prompts), max(map(len, forced)), S), -1, dtype=np.int64)
    for b, rows in enumerate(forced):
        rows_BRS[b, : len(rows)] = rows
    first = min(layout.delays)

    def per_stream(name: str, missing: float) -> Tensor:
        return _per_segment(prompts, lambda p, s: s.settings.per_stream(name, S, missing))

    repetition_penalty = per_stream("repetition_penalty", 1.0)
    is_off = repetition_penalty == 1
    return DecodeState.new(
        len(prompts),
        scope_ids=columns.ids,
        delays=layout.delays,
        pad_ids=[layout.pad_id] * S,
        eos_id=layout.sos_eos_id,
        scope=_per_segment(prompts, lambda p, s: columns.scope(s.modality)),
        num_segments=torch.tensor([len(p.segments) for p in prompts]),
        markers=_per_segment(prompts, lambda p, s: layout.marker_id(s.modality)),
        temperature=_per_segment(prompts, lambda p, s: _temperatures(s.settings, S)),
        top_k=per_stream("top_k", 0),
        top_p=per_stream("top_p", 1.0).clamp(min=1e-30),  # not 0 in float32
        min_p=per_stream("min_p", 0.0),
        repetition_penalty=repetition_penalty,
        repetition_window=per_stream("repetition_window", 0).masked_fill(is_off, 0),
        seed=torch.tensor([p.segments[0].settings.seed for p in prompts]),
        min_frames=_per_segment(prompts, lambda p, s: s.min_new + (p.num_given if s is p.segments[0] else 0)),
        max_frames=_per_segment(prompts, lambda p, s: s.max_new + (p.num_given if s is p.segments[0] else 0)),
        row_limit=_per_segment(prompts, lambda p, s: s.row_limit - len(p.frames_PS) - first),
        step=torch.tensor([p.num_given + first for p in prompts]),
        guidance=torch.tensor([float(p.segments[0].settings.guidance) for p in prompts]),
        forced=torch.from_numpy(rows_BRS),
        num_rows=1,
        tail=layout.max_delay,
        device=device,
    )


def _per_segment(prompts: Sequence[Prompt], value: Callable[[Prompt, Segment], Any]) -> Tensor:
    """``value`` of every segment: ``[B, G, ...]``; a prompt with fewer segments repeats its last one."""
    G = max(len(p.segments) for p in prompts)
    return torch.tensor(
        [[value(p, p.segments[min(g, len(p.segments) - 1)]) for g in range(G)] for p in prompts]
    )


def _temperatures(settings: SamplingSettings, num_streams: int) -> list[float]:
    """Temperature of each stream; 0 is greedy."""
    if settings.greedy or settings.temperature is None:
        return [0.0] * num_streams
    first, *rest = settings.per_stream("temperature", num_streams, 0.0)
    return [
        first,
        *(rest if settings.codec_temperature is None else [settings.codec_temperature] * len(rest)),
    ]


def slots(state: DecodeState, count: int) -> DecodeState:
    """The first ``count`` requests of a state, as views."""
    return dataclasses.replace(state, **{name: getattr(state, name)[:count] for name in ROWS})


def resized(state: DecodeState, num_slots: int, segments: int, forced: int, rows: int) -> DecodeState:
    """A state with at least these B, G, R and H that keeps its values; added requests are done."""

    B, G = num_slots, segments
    sizes = {"sampling": (B, G), "choice": (B, G), "limits": (B, G), "forced": (B, forced)}
    sizes |= {"history": (B, rows), "history_logprob": (B, rows)}
    fill = {"forced": -1, "history_logprob": float("nan")}
    old = {name: getattr(state, name) for name in ROWS}
    new = {name: _grown(x, sizes.get(name, (B,)), fill.get(name, 0)) for name, x in old.items()}
    if all(new[name] is x for name, x in old.items()):
        return state
    state = dataclasses.replace(state, **new)
    state.done[len(old["progress"]) :] = 1
    return state


def _grown(x: Tensor, sizes: Sequence[int], fill: float) -> Tensor:
    """``x`` padded to at least ``sizes`` in its leading dimensions; itself if it has them."""
    missing = [max(0, size - old) for size, old in zip(sizes, x.shape, strict=False)]
    pads = [0, 0] * (x.dim() - len(missing)) + [pad for size in reversed(missing) for pad in (0, size)]
    return F.pad(x, pads, value=fill) if any(pads) else x


def with_columns(
    old: DecodeState | None, prompts: Sequence[Prompt], columns: Columns, num_slots: int, device: torch.device
) -> DecodeState:
    """The state of ``num_slots`` requests for other columns of the logits; ``old`` gives everything else.

    Args:
        prompts: of the active requests; those that are not in ``old`` are done until :func:`put` sets them.
    """
    unknown = np.empty((0, columns.layout.num_streams), dtype=np.int64)
    state = resized(new_state(prompts, columns, [unknown] * len(prompts), device), num_slots, 1, 0, 0)
    state.done[:] = 1
    if old is None:
        return state
    state = resized(state, num_slots, old.limits.shape[1], old.forced.shape[1], old.history.shape[1])
    first_column, end_column = state.first_column.clone(), state.end_column.clone()
    for name in ROWS:
        values = getattr(old, name)
        getattr(state, name)[tuple(slice(0, size) for size in values.shape)] = values
    state.first_column[:], state.end_column[:] = first_column, end_column
    return state


def put(state: DecodeState, slot: int, other: DecodeState, row: int) -> None:
    """Write request ``row`` of ``other``, whose sizes are not larger, into ``slot``."""
    for name in INPUTS:
        into, new = getattr(state, name)[slot], getattr(other, name)[row]
        if new.dim() == 0 or into.shape == new.shape:
            into.copy_(new)
            continue
        into.fill_(-1 if name == "forced" else 0)
        into[: new.shape[0]] = new
