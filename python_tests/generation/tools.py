"""Shared pieces of the generation tests: layouts with odd delays, a scripted model, training's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import Decoded
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.encode_fields import content_frames
from speechlm_ext.generation.requests.prompt import Prompt, Segment, special_frame
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.tasks import builtin_tasks


def make_layout(kind: str = "codec_ssl", delays: tuple[int, ...] | None = None) -> TokenLayout:
    """A small layout: ``codec_ssl`` S = 4, ``codec`` S = 3, ``ssl`` S = 1."""
    if kind == "codec_ssl":
        return TokenLayout.build(ssl=11, codec=(7, 8, 9), text=20, delays=delays)
    if kind == "codec":
        return TokenLayout.build(codec=(7, 8, 9), text=20, delays=delays)
    return TokenLayout.build(ssl=11, text=20, delays=delays)


def random_content(
    layout: TokenLayout, modality: str, num_frames: int, rng: np.random.Generator
) -> np.ndarray:
    """Random content in layout ids, int64 ``[T, S]``."""
    sizes = [r[1] - r[0] for r in layout.content_ranges(modality) if r is not None]
    raw = np.stack([rng.integers(0, size, num_frames) for size in sizes], axis=1)
    return content_frames(raw, modality, layout, "test")


def training_frames(layout: TokenLayout, task: str, contents: list[np.ndarray]) -> np.ndarray:
    """The undelayed sequence of a whole sample, written out by hand from the rule of the design."""
    template = builtin_tasks()[task]
    tail = np.full((layout.max_delay, layout.num_streams), layout.pad_id, dtype=np.int64)
    parts = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(task), layout)]
    for (entry, is_target), content in zip(template.entries, contents, strict=True):
        parts += [special_frame(layout.marker_id(entry.modality), layout), content]
        parts += [special_frame(layout.sos_eos_id, layout)] if is_target else []
        parts.append(tail)
    return np.concatenate(parts)


def shift(frames: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Delay one sequence, keeping the tail: ``[T + max_delay, S]``; a second implementation of the rule."""
    out = np.full((len(frames) + layout.max_delay, layout.num_streams), layout.pad_id, dtype=np.int64)
    for s, delay in enumerate(layout.delays):
        out[delay : delay + len(frames), s] = frames[:, s]
    return out


def make_prompt(
    layout: TokenLayout,
    task: str,
    conditions: list[np.ndarray],
    given: np.ndarray | None = None,
    settings: SamplingSettings | None = None,
    name: str = "r",
    max_new: int = 12,
) -> Prompt:
    """A prompt from ready content in layout ids."""
    template = builtin_tasks()[task]
    target = template.targets[0]
    settings = (settings or SamplingSettings()).resolved(target.modality)
    tail = np.full((layout.max_delay, layout.num_streams), layout.pad_id, dtype=np.int64)
    parts = [special_frame(layout.sos_eos_id, layout), special_frame(layout.task_id(task), layout)]
    for entry, content in zip(template.conditions, conditions, strict=True):
        parts += [special_frame(layout.marker_id(entry.modality), layout), content, tail]
    parts.append(special_frame(layout.marker_id(target.modality), layout))
    parts += [given] if given is not None else []
    segment = Segment(target.modality, settings, settings.min_len, settings.max_len or max_new)
    return Prompt(name, template, np.concatenate(parts), 0 if given is None else len(given), (segment,))


class ScriptedModel(torch.nn.Module):
    """Gives every id a logit that is a hash of the request's own rows so far, like a model without weights.

    ``bias`` maps (id, row) to an addition, or to NaN; rows are those of the token that is chosen.
    """

    frame = None

    def __init__(self, layout: TokenLayout, bias: dict | None = None) -> None:
        super().__init__()
        self.layout, self.bias = layout, bias or {}
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    class Cache:
        """The hash after each row of a slot, as a real cache has the keys of each."""

        def __init__(self, num_slots: int) -> None:
            self.trail: list[list[int]] = [[0] for _ in range(num_slots)]

        def reserve(self, num_rows: int) -> None:
            pass

        def copy(self, source: int, slots: Sequence[int], length: int | None = None) -> None:
            for slot in slots:
                self.trail[slot] = self.trail[source][: None if length is None else length + 1]

        def move(self, source: int, slot: int) -> None:
            self.trail[slot], self.trail[source] = self.trail[source], [0]

        def release(self, slot: int) -> None:
            self.trail[slot] = [0]

        def restore(self, slot: int, length: int) -> None:
            assert length == 0, "a hash cannot be had back"

        def feed(self, slot: int, row: torch.Tensor) -> None:
            trail = self.trail[slot]
            value = int((row * torch.arange(1, len(row) + 1)).sum()) + (len(trail) - 1) * 7
            trail.append((trail[-1] * 31 + value) % 1000003)

    def new_cache(self, num_slots: int, num_rows: int) -> ScriptedModel.Cache:
        return self.Cache(num_slots)

    def prefill(self, ids_NS, cache, slots, lengths):
        for slot, rows in zip(slots, ids_NS.split(list(lengths)), strict=True):
            for row in rows:
                cache.feed(slot, row)

    def step_hidden(self, ids_BS, cache):
        for slot, row in enumerate(ids_BS):
            cache.feed(slot, row)
        trails = cache.trail[: len(ids_BS)]
        return torch.tensor([[trail[-1], len(trail) - 1] for trail in trails], dtype=torch.float64)

    def scope_head(self, ranges):
        return ScriptedHead(self, ranges)


class ScriptedHead:
    """The logits of a :class:`ScriptedModel` in the form of :class:`speechlm_ext.model.decode_head.DecodeHead`."""

    def __init__(self, model: ScriptedModel, ranges) -> None:
        self.model = model
        self.ids = [torch.cat([torch.arange(a, b) for a, b in parts]) for parts in ranges]

    def reserve(self, num_rows):
        pass

    def used_by(self, ranges):
        return None

    def __call__(self, hidden_BD, used=None):
        hash_B, row_B = hidden_BD[:, 0].long(), hidden_BD[:, 1].long()
        out = []
        for s, ids in enumerate(self.ids):
            logits = ((hash_B[:, None] * 131 + ids * 977 + s * 7919) % 1009).float() / 200
            for (token, row), value in self.model.bias.items():
                hit = (ids[None] == token) & ((row_B[:, None] == row) | (row is None))
                logits = torch.where(hit, torch.tensor(float(value)), logits)
            out.append(logits)
        return torch.cat(out, dim=1)


def decode(
    model: SpeechLMModel,
    prompts: Sequence[Prompt],
    forced_targets: Sequence[np.ndarray] | None = None,
    num_slots: int | None = None,
) -> list[Decoded]:
    """Decode prompts together.

    Args:
        model: a :class:`SpeechLMModel` in eval mode.
        prompts: any mix of tasks and lengths.
        forced_targets: for each prompt the content int64 ``[T, S]`` (layout ids) to force instead of sampling;
            ``logprob_TS`` and ``end_logprob`` of the results then are those of that content.
        num_slots: rows decoded at once; default all.

    Returns:
        One :class:`Decoded` per prompt, in order. A request whose logits are not finite is ``failed``; the others are
        unaffected.
    """
    targets: Sequence[np.ndarray | None] = forced_targets or [None] * len(prompts)
    engine = Engine(model, num_slots or max(sum(p.num_slots for p in prompts), 1))
    jobs = [DecodeJob(n, p, t) for n, (p, t) in enumerate(zip(prompts, targets, strict=True))]
    found = {job.key: decoded for job, decoded in engine.run(jobs)}
    return [found[job.key] for job in jobs]
