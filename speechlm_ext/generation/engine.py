"""Batched decoding of delayed streams with a KV cache.

The decoder walks delayed rows. In row r, stream s stands at undelayed frame ``u = r - delay[s]``, and one
rule says what belongs there, with P the prompt's frames and E the end (the frame of the target's end token):

    u < P         the prompt's own token, pad before the first: ramp-in, lagging codes of a given beginning
    P <= u < E    a token chosen by the model, from the stream's own range only
    u = E         the end token in stream 0, pad in the others
    u > E         pad

E starts as the longest length allowed, which forces the end there, and drops to u as soon as stream 0 chooses
the end token; streams that are delayed behind stream 0 still owe their last frames (ramp-out), and those that
are level with it end in the same row. So a decoded sequence has, row by row, the form that training packs.

Axes: B requests, R delayed rows, P prompt frames, S streams, K cached rows, D hidden, V a stream's columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.prompt import Prompt
from speechlm_ext.generation.sampling import SamplingTensors, choose, counter_uniform, masked_logprob
from speechlm_ext.layout import TokenLayout

if TYPE_CHECKING:
    from speechlm_ext.model.speechlm import SpeechLM


@dataclass(frozen=True, eq=False)
class Decoded:
    """One decoded target in layout ids."""

    content_TS: np.ndarray
    """int64 ``[T, S]``: the target's frames, undelayed, the given beginning included, the end not."""
    rows_RS: np.ndarray
    """int64 ``[R, S]``: all delayed rows, prompt included, up to the last one with a token."""
    finished: str
    """``eos``, ``max_len`` or ``failed``."""
    logprob: float
    num_scored: int
    error: str | None = None


def delayed_rows(frames_PS: np.ndarray, num_rows: int, layout: TokenLayout, unknown: int = -1) -> np.ndarray:
    """The first ``num_rows`` delayed rows of a sequence that begins with ``frames_PS``: int64 ``[R, S]``.

    Places that belong to later frames hold ``unknown``.
    """
    rows_RS = np.empty((num_rows, layout.num_streams), dtype=np.int64)
    for s, delay in enumerate(layout.delays):
        u_R = np.arange(num_rows) - delay
        known = np.where(u_R < 0, layout.pad_id, frames_PS[np.clip(u_R, 0, len(frames_PS) - 1), s])
        rows_RS[:, s] = np.where(u_R >= len(frames_PS), unknown, known)
    return rows_RS


class _Scope:
    """Which ids each stream's logits are asked for in a batch, and which of them each request may choose."""

    def __init__(self, prompts: list[Prompt], layout: TokenLayout, device: torch.device) -> None:
        content_B = [layout.content_ranges(p.modality) for p in prompts]
        eos = (layout.sos_eos_id, layout.sos_eos_id + 1)
        self.ranges: list[list[tuple[int, int]] | None] = []
        self.ids: list[Tensor | None] = []
        self.allowed: list[Tensor | None] = []
        for s in range(layout.num_streams):
            wanted = {r for content in content_B if (r := content[s]) is not None}
            # Ascending, so that the first column among equals is the lowest id.
            ranges = sorted(wanted | ({eos} if s == 0 else set()))
            self.ranges.append(ranges if wanted else None)
            ids_V = np.concatenate([np.arange(a, b) for a, b in ranges]) if wanted else None
            self.ids.append(None if ids_V is None else torch.from_numpy(ids_V).to(device))
            if ids_V is None:
                self.allowed.append(None)
                continue
            allowed_BV = np.zeros((len(prompts), len(ids_V)), dtype=bool)
            for b, content in enumerate(content_B):
                if (r := content[s]) is not None:
                    allowed_BV[b] = (ids_V >= r[0]) & (ids_V < r[1])
            self.allowed.append(torch.from_numpy(allowed_BV).to(device))
        has_BS = np.array([[r is not None for r in content] for content in content_B])
        self.has_content_BS = torch.from_numpy(has_BS).to(device)
        slowest = [max(d for d, has in zip(layout.delays, row, strict=True) if has) for row in has_BS]
        self.slowest_B = torch.tensor(slowest, device=device)

    def select(self, keep_B: Tensor) -> None:
        """Drop requests."""
        self.allowed = [None if a is None else a[keep_B] for a in self.allowed]
        self.has_content_BS = self.has_content_BS[keep_B]
        self.slowest_B = self.slowest_B[keep_B]


@torch.inference_mode()
def decode(model: SpeechLM, prompts: list[Prompt], teacher: list[np.ndarray] | None = None) -> list[Decoded]:
    """Decode one target for each prompt, all in one batch.

    Args:
        model: a :class:`SpeechLM` in eval mode; its device is used.
        prompts: any tasks and lengths together.
        teacher: for each prompt the content int64 ``[T, S]`` (layout ids) to force instead of choosing; the
            log-probabilities are then those of this content and its end.

    Returns:
        One :class:`Decoded` per prompt, in order. A request whose logits are not finite is ``failed``; the
        others go on.
    """
    if not prompts:
        return []
    layout, device = model.layout, next(model.parameters()).device
    state = _State(prompts, layout, device, teacher)
    cache = model.new_cache()
    prefix_B = [delayed_rows(p.frames_PS, len(p.frames_PS) + state.first, layout) for p in prompts]
    longest = max(len(rows) for rows in prefix_B)
    ids_BRS = torch.full((len(prompts), longest, layout.num_streams), layout.pad_id, dtype=torch.int64)
    key_mask_BK = torch.zeros((len(prompts), longest), dtype=torch.bool)
    position_BR = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for b, rows in enumerate(prefix_B):
        ids_BRS[b, longest - len(rows) :] = torch.from_numpy(rows)
        key_mask_BK[b, longest - len(rows) :] = True
        position_BR[b, longest - len(rows) :] = torch.arange(len(rows))
    ids_BRS, key_mask_BK, position_BR = ids_BRS.to(device), key_mask_BK.to(device), position_BR.to(device)
    hidden_BRD = model.cached_hidden(ids_BRS, cache=cache, position_BT=position_BR, key_mask_BK=key_mask_BK)
    hidden_BD = hidden_BRD[:, -1]
    while True:
        row_BS = state.step(model.scope_logits(hidden_BD, state.scope.ranges))
        active_B = state.active_B
        num_active = int(active_B.sum())
        if num_active == 0:
            return state.collect(prefix_B)
        if num_active <= len(active_B) // 2:
            # Half of the batch is done: go on with the rest only.
            keep_B = active_B.nonzero()[:, 0]
            cache.batch_select_indices(keep_B)
            key_mask_BK, row_BS = key_mask_BK[keep_B], row_BS[keep_B]
            state.select(keep_B)
        key_mask_BK = torch.cat([key_mask_BK, key_mask_BK.new_ones(len(key_mask_BK), 1)], dim=1)
        hidden_BD = model.cached_hidden(
            row_BS[:, None], cache=cache, position_BT=state.row_B[:, None] - 1, key_mask_BK=key_mask_BK
        )[:, -1]


@dataclass(frozen=True)
class _Outcome:
    """How a request came to its end: rows generated, the end's frame, whether the model chose it."""

    steps: int
    end: int
    chose_end: bool
    failed: bool


class _State:
    """Where each request of a batch stands: its row, its end, and the tokens so far."""

    def __init__(
        self,
        prompts: list[Prompt],
        layout: TokenLayout,
        device: torch.device,
        teacher: list[np.ndarray] | None,
    ) -> None:
        self.prompts, self.layout, self.device = prompts, layout, device
        self.first = min(layout.delays)
        self.delay_S = torch.tensor(layout.delays, device=device)
        self.scope = _Scope(prompts, layout, device)
        self.sampling = SamplingTensors.of([p.settings for p in prompts], device)
        self.target_B = torch.tensor([p.target for p in prompts], device=device)
        self.prompt_B = torch.tensor([len(p.frames_PS) for p in prompts], device=device)
        self.start_B = self.prompt_B - torch.tensor([p.num_given for p in prompts], device=device)
        self.row_B = self.prompt_B + self.first
        self.min_end_B = self.prompt_B + torch.tensor([p.min_new for p in prompts], device=device)
        limits = [p.max_new for p in prompts] if teacher is None else [len(t) for t in teacher]
        self.limit_B = self.prompt_B + torch.tensor(limits, device=device)
        self.end_B = self.limit_B.clone()
        self.chose_end_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.failed_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.active_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        # Rows in which some stream still stands in the prompt.
        lag = layout.max_delay - self.first
        ramp = [delayed_rows(p.frames_PS, len(p.frames_PS) + layout.max_delay, layout) for p in prompts]
        self.ramp_BRS = (
            torch.from_numpy(np.stack([r[len(r) - lag :] for r in ramp])).to(device) if lag else None
        )
        self.teacher_BTS = None
        if teacher is not None:
            padded = np.full(
                (len(prompts), max(map(len, teacher)) + 1, layout.num_streams), layout.pad_id, np.int64
            )
            for b, content_TS in enumerate(teacher):
                padded[b, : len(content_TS)] = content_TS
                padded[b, len(content_TS), 0] = layout.sos_eos_id
            self.teacher_BTS = torch.from_numpy(padded).to(device)
        self.origin = list(range(len(prompts)))
        self.steps = 0
        # Per row: which requests it holds, their tokens, and their log-probabilities (NaN: not scored).
        self.history: list[tuple[list[int], Tensor, Tensor]] = []
        self.outcome: dict[int, _Outcome] = {}

    def step(self, logits: list[Tensor | None]) -> Tensor:
        """Fill the present row from the streams' logits, move on by one, and return it: int64 ``[B, S]``."""
        layout, pad = self.layout, self.layout.pad_id
        frame_BS = self.row_B[:, None] - self.delay_S
        uniform_BS = self._uniform()
        columns, score_columns = [], []
        for s in range(layout.num_streams):
            u_B = frame_BS[:, s]
            token_B = torch.full_like(u_B, pad)
            score_B = torch.full((len(u_B),), torch.nan, dtype=torch.float32, device=self.device)
            ids_V, allowed_BV, logits_BV = self.scope.ids[s], self.scope.allowed[s], logits[s]
            free_B = (
                (u_B >= self.prompt_B) & (u_B < self.end_B) & self.scope.has_content_BS[:, s] & self.active_B
            )
            at_end_B = (u_B == self.end_B) if s == 0 else torch.zeros_like(free_B)
            if ids_V is not None and allowed_BV is not None and logits_BV is not None:
                # The end of taught content is scored like a token; an end forced by the length is not.
                scored_B = free_B if self.teacher_BTS is None else free_B | (at_end_B & self.active_B)
                if s == 0:
                    may_end_B = u_B >= self.min_end_B if self.teacher_BTS is None else torch.ones_like(free_B)
                    allowed_BV = allowed_BV | (may_end_B[:, None] & (ids_V == layout.sos_eos_id))
                logprob_BV, bad_B = masked_logprob(logits_BV, allowed_BV)
                self.failed_B = self.failed_B | (bad_B & scored_B)
                if self.teacher_BTS is None:
                    column_B = choose(logprob_BV, self.sampling, uniform_BS[:, s])
                    chosen_B = ids_V[column_B]
                else:
                    index_B = (u_B - self.prompt_B).clamp(0, self.teacher_BTS.shape[1] - 1)
                    chosen_B = self.teacher_BTS[torch.arange(len(u_B), device=self.device), index_B, s]
                    column_B = torch.searchsorted(ids_V, chosen_B.contiguous()).clamp_max(len(ids_V) - 1)
                score_B = torch.where(scored_B, logprob_BV.gather(1, column_B[:, None])[:, 0], score_B)
                token_B = torch.where(free_B, chosen_B, token_B)
                if s == 0:
                    ended_B = free_B & (chosen_B == layout.sos_eos_id)
                    self.end_B = torch.where(ended_B, u_B, self.end_B)
                    self.chose_end_B = self.chose_end_B | ended_B
            if s == 0:
                token_B = token_B.masked_fill(at_end_B, layout.sos_eos_id)
            columns.append(token_B)
            score_columns.append(score_B)
        row_BS = torch.stack(columns, dim=1)
        if self.ramp_BRS is not None and self.steps < self.ramp_BRS.shape[1]:
            known_BS = self.ramp_BRS[:, self.steps]
            row_BS = torch.where(known_BS >= 0, known_BS, row_BS)
        self._keep(row_BS, torch.stack(score_columns, dim=1))
        return row_BS

    def _uniform(self) -> Tensor:
        """Draws of this row, counted from the target's first row, float64 ``[B, S]``."""
        row_B = self.row_B - self.prompt_B - self.first
        return counter_uniform(self.sampling.seed_B, self.target_B, row_B, self.layout.num_streams)

    def _keep(self, row_BS: Tensor, score_BS: Tensor) -> None:
        """Store the row, close what is complete or has failed, and move on."""
        owed_B = torch.where(self.end_B > self.start_B, self.end_B - 1 + self.scope.slowest_B, 0)
        last_B = torch.maximum(self.end_B + self.delay_S[0], owed_B)
        done_B = self.active_B & ((self.row_B >= last_B) | self.failed_B)
        self.history.append((self.origin, row_BS, score_BS))
        self.active_B = self.active_B & ~done_B
        for b in done_B.nonzero()[:, 0].tolist():
            self.outcome[self.origin[b]] = _Outcome(
                self.steps + 1, int(self.end_B[b]), bool(self.chose_end_B[b]), bool(self.failed_B[b])
            )
        self.row_B = self.row_B + 1
        self.steps += 1

    def select(self, keep_B: Tensor) -> None:
        """Go on with some requests only."""
        for name in (
            "target_B",
            "prompt_B",
            "start_B",
            "row_B",
            "min_end_B",
            "limit_B",
            "end_B",
            "chose_end_B",
            "failed_B",
            "active_B",
        ):
            setattr(self, name, getattr(self, name)[keep_B])
        if self.ramp_BRS is not None:
            self.ramp_BRS = self.ramp_BRS[keep_B]
        if self.teacher_BTS is not None:
            self.teacher_BTS = self.teacher_BTS[keep_B]
        self.sampling = self.sampling.select(keep_B)
        self.scope.select(keep_B)
        self.origin = [self.origin[b] for b in keep_B.tolist()]

    def collect(self, prefix_B: list[np.ndarray]) -> list[Decoded]:
        """Undelay every request's rows into content frames."""
        rows: list[list[np.ndarray]] = [[] for _ in self.prompts]
        scores: list[list[np.ndarray]] = [[] for _ in self.prompts]
        for origins, group in itertools.groupby(self.history, key=lambda item: item[0]):
            held = list(group)
            row_RBS = torch.stack([item[1] for item in held]).cpu().numpy()
            score_RBS = torch.stack([item[2] for item in held]).double().cpu().numpy()
            for b, origin in enumerate(origins):
                rows[origin].append(row_RBS[:, b])
                scores[origin].append(score_RBS[:, b])
        results = []
        for origin, prompt in enumerate(self.prompts):
            outcome = self.outcome[origin]
            end = outcome.end
            rows_RS = np.concatenate([prefix_B[origin], np.concatenate(rows[origin])[: outcome.steps]])
            score_RS = np.concatenate(scores[origin])[: outcome.steps]
            if outcome.failed:
                message = (
                    f"request {prompt.id!r}: the model's logits are not finite in row {len(rows_RS) - 1}."
                )
                results.append(Decoded(rows_RS[:0], rows_RS, "failed", float("nan"), 0, message))
                continue
            start = len(prompt.frames_PS) - prompt.num_given
            content_TS = np.full((end - start, rows_RS.shape[1]), self.layout.pad_id, dtype=np.int64)
            scored, total = 0, 0.0
            for s, delay in enumerate(self.layout.delays):
                # A stream without content may lie outside the rows; it stays pad.
                part = rows_RS[start + delay : end + delay, s]
                content_TS[: len(part), s] = part
                u_R = np.arange(len(prefix_B[origin]), len(rows_RS)) - delay
                # Streams ahead of stream 0 may have chosen codes past an end they did not know of.
                mine = ~np.isnan(score_RS[:, s]) & (u_R < end + (s == 0))
                scored, total = scored + int(mine.sum()), total + float(score_RS[mine, s].sum())
            finished = "eos" if outcome.chose_end or self.teacher_BTS is not None else "max_len"
            results.append(Decoded(content_TS, rows_RS, finished, total, scored))
        return results


def check_teacher(content_TS: np.ndarray, prompt: Prompt, layout: TokenLayout) -> None:
    """Raise :class:`GenerationError` if ``content_TS`` has ids outside the target's ranges."""
    for s, ids in enumerate(layout.content_ranges(prompt.modality)):
        column = content_TS[:, s]
        bad = (column != layout.pad_id) if ids is None else ((column < ids[0]) | (column >= ids[1]))
        if bad.any():
            raise GenerationError(
                f"request {prompt.id!r}: forced frame {int(bad.argmax())} has id {int(column[bad.argmax()])} "
                f"in stream {s}, outside {ids} of {prompt.modality}."
            )
