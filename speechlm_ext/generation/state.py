"""The sampler's state for a batch of prompts: scopes, masks, settings and lengths of every request."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.generation.prompt import Prompt
from speechlm_ext.generation.request import SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops.multistream_sample import DecodeState


def new_state(prompts: list[Prompt], layout: TokenLayout, device: torch.device) -> DecodeState:
    """The sampler's state before the first row: scopes, masks, settings and lengths of every request.

    Each stream's columns are the union of what the batch's requests may choose there, in ascending order, so
    that the first column among equals is the lowest id. Frames are counted from the target's first one,
    a given beginning included.
    """
    content_B = [layout.content_ranges(p.modality) for p in prompts]
    eos = (layout.sos_eos_id, layout.sos_eos_id + 1)
    scope_ids, allowed = [], []
    # Streams after the last one that some request uses are left out: text costs one stream, not S.
    used = 1 + max(s for content in content_B for s, r in enumerate(content) if r is not None)
    for s in range(used):
        wanted = {r for content in content_B if (r := content[s]) is not None}
        # A stream that no request uses has one column that is never read.
        unused = (layout.pad_id, layout.pad_id + 1)
        ranges = sorted(wanted | {eos} if s == 0 else wanted or {unused})
        ids_V = np.concatenate([np.arange(start, end) for start, end in ranges])
        allowed_BV = np.zeros((len(prompts), len(ids_V)), dtype=bool)
        for b, content in enumerate(content_B):
            if (r := content[s]) is not None:
                allowed_BV[b] = (ids_V >= r[0]) & (ids_V < r[1])
                allowed_BV[b] |= (s == 0) & (ids_V == layout.sos_eos_id)
        scope_ids.append(torch.from_numpy(ids_V).to(device))
        allowed.append(torch.from_numpy(allowed_BV).to(device))
    settings = [p.settings for p in prompts]

    def per_stream(values: list) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    def per_request(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    first = min(layout.delays)
    state = DecodeState.new(
        len(prompts),
        scope_ids=scope_ids,
        delays=layout.delays[:used],
        pad_ids=[layout.pad_id] * used,
        eos_id=layout.sos_eos_id,
        temperature=torch.tensor([_temperatures(s, used) for s in settings], device=device),
        top_k=per_stream([s.top_k or 0 for s in settings]),
        top_p=per_stream([1.0 if s.top_p is None else s.top_p for s in settings]),
        seed=per_request([s.seed for s in settings]),
        min_frames=per_request([p.num_given + p.min_new for p in prompts]),
        max_frames=per_request([p.num_given + p.max_new for p in prompts]),
        active=torch.tensor(
            [[r is not None for r in content[:used]] for content in content_B], device=device
        ),
        rng_offset=per_request([p.target << 32 for p in prompts]),
        allowed=allowed,
        device=device,
    )
    return dataclasses.replace(state, step=per_request([p.num_given + first for p in prompts]))


def _temperatures(settings: SamplingSettings, num_streams: int) -> list[float]:
    """Of each stream; 0 is greedy."""
    if settings.greedy or settings.temperature is None:
        return [0.0] * num_streams
    rest = settings.temperature if settings.codec_temperature is None else settings.codec_temperature
    return [settings.temperature] + [rest] * (num_streams - 1)


def select_state(state: DecodeState, keep_B: Tensor) -> DecodeState:
    """The state of some requests of the batch."""
    tensors = {
        f.name: value[keep_B]
        for f in dataclasses.fields(state)
        if isinstance(value := getattr(state, f.name), Tensor)
    }
    allowed = (
        None if state.allowed is None else tuple(None if a is None else a[keep_B] for a in state.allowed)
    )
    return dataclasses.replace(state, **tensors, allowed=allowed)


def as_ranges(ids_V: Tensor, pad_id: int) -> list[tuple[int, int]] | None:
    """Ascending ids as ``(start, end)`` ranges; None for the one column of a stream that nobody uses."""
    ids = ids_V.cpu().numpy()
    if len(ids) == 1 and ids[0] == pad_id:
        return None
    parts = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]
