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
import torch.nn.functional as F
from torch import Tensor

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.prompt import Prompt
from speechlm_ext.generation.state import as_ranges, new_state, select_state
from speechlm_ext.layout import TokenLayout
from speechlm_ext.ops.multistream_sample import advance, multistream_sample

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


@torch.inference_mode()
def decode(model: SpeechLM, prompts: list[Prompt], teacher: list[np.ndarray] | None = None) -> list[Decoded]:
    """Decode one target for each prompt, all in one batch.

    Args:
        model: a :class:`SpeechLM` in eval mode; its device is used.
        prompts: any tasks and lengths together.
        teacher: for each prompt the content int64 ``[T, S]`` (layout ids) to force instead of choosing;
            nothing is scored then.

    Returns:
        One :class:`Decoded` per prompt, in order. A request whose logits are not finite is ``failed``; the
        others go on.
    """
    if not prompts:
        return []
    layout, device = model.layout, next(model.parameters()).device
    batch = _Batch(prompts, layout, device, teacher)
    cache = model.new_cache()
    longest = max(len(rows) for rows in batch.prefix)
    ids_BRS = torch.full((len(prompts), longest, layout.num_streams), layout.pad_id, dtype=torch.int64)
    key_mask_BK = torch.zeros((len(prompts), longest), dtype=torch.bool)
    position_BR = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for b, rows in enumerate(batch.prefix):
        ids_BRS[b, longest - len(rows) :] = torch.from_numpy(rows)
        key_mask_BK[b, longest - len(rows) :] = True
        position_BR[b, longest - len(rows) :] = torch.arange(len(rows))
    ids_BRS, key_mask_BK, position_BR = ids_BRS.to(device), key_mask_BK.to(device), position_BR.to(device)
    position_B = position_BR[:, -1]
    hidden_BRD = model.cached_hidden(ids_BRS, cache=cache, position_BT=position_BR, key_mask_BK=key_mask_BK)
    hidden_BD = hidden_BRD[:, -1]
    while True:
        row_BS, active_B = batch.step(model.scope_logits(hidden_BD, batch.ranges))
        num_active = int(active_B.sum())
        if num_active == 0:
            return batch.collect()
        if num_active <= len(active_B) // 2:
            # Half of the batch is done: go on with the rest only.
            keep_B = active_B.nonzero()[:, 0]
            cache.batch_select_indices(keep_B)
            key_mask_BK, row_BS, position_B = key_mask_BK[keep_B], row_BS[keep_B], position_B[keep_B]
            batch.select(keep_B)
        key_mask_BK = torch.cat([key_mask_BK, key_mask_BK.new_ones(len(key_mask_BK), 1)], dim=1)
        position_B = position_B + 1
        hidden_BD = model.cached_hidden(
            row_BS[:, None], cache=cache, position_BT=position_B[:, None], key_mask_BK=key_mask_BK
        )[:, -1]


class _Batch:
    """The requests of one batch: their known rows, the sampler's state, and the rows generated so far."""

    def __init__(
        self,
        prompts: list[Prompt],
        layout: TokenLayout,
        device: torch.device,
        teacher: list[np.ndarray] | None,
    ) -> None:
        self.prompts, self.layout = prompts, layout
        self.has_teacher = teacher is not None
        self.state = new_state(prompts, layout, device)
        self.ranges = [as_ranges(ids, layout.pad_id) for ids in self.state.scope_ids]
        self.ranges += [None] * (layout.num_streams - len(self.ranges))
        self.delay_S = torch.tensor(layout.delays, device=device)
        first, lag = min(layout.delays), layout.max_delay - min(layout.delays)
        self.prefix = [delayed_rows(p.frames_PS, len(p.frames_PS) + first, layout) for p in prompts]
        # Rows after the prefix in which something is known beforehand (-1: to be chosen).
        if teacher is None:
            known = [
                delayed_rows(p.frames_PS, len(p.frames_PS) + layout.max_delay, layout)[-lag:]
                if lag
                else np.empty((0, layout.num_streams), dtype=np.int64)
                for p in prompts
            ]
        else:
            known = [_forced_rows(p, t, layout) for p, t in zip(prompts, teacher, strict=True)]
        known_BRS = np.full((len(prompts), max(map(len, known)), layout.num_streams), -1, dtype=np.int64)
        for b, rows in enumerate(known):
            known_BRS[b, : len(rows)] = rows
        self.known_BRS = torch.from_numpy(known_BRS).to(device)
        self.active_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.origin = list(range(len(prompts)))
        self.steps = 0
        # Per row: which requests it holds, their tokens, and their log-probabilities (NaN: not chosen).
        self.history: list[tuple[list[int], Tensor, Tensor]] = []
        self.outcome: dict[int, _Outcome] = {}

    def step(self, logits: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Fill the present row from the streams' logits and move on by one.

        Returns:
            ``(row_BS int64, active_B bool)``: the row, and which requests are not complete.
        """
        state, used = self.state, len(self.state.delays)
        unread_B1 = torch.zeros((len(self.origin), 1), device=state.step.device)
        sampled = multistream_sample([unread_B1 if x is None else x for x in logits[:used]], state)
        frame_BS = state.step[:, None] - self.delay_S[:used]
        # Streams ahead of stream 0 stop at the longest length by themselves: it is known beforehand.
        past_BS = frame_BS >= state.max_frames[:, None]
        past_BS[:, 0] = False
        chosen_BS = sampled.is_content & ~past_BS
        chosen_BS[:, 0] &= frame_BS[:, 0] < state.max_frames
        row_BS, logprob_BS, chosen_BS = (
            F.pad(x, (0, len(self.delay_S) - used), value=fill)
            for x, fill in (
                (sampled.tokens.masked_fill(past_BS, self.layout.pad_id), self.layout.pad_id),
                (sampled.logprob, 0.0),
                (chosen_BS, False),
            )
        )
        if self.steps < self.known_BRS.shape[1]:
            known_BS = self.known_BRS[:, self.steps]
            row_BS = torch.where(known_BS >= 0, known_BS, row_BS)
            chosen_BS = chosen_BS & (known_BS < 0)
        self.history.append((self.origin, row_BS, logprob_BS.masked_fill(~chosen_BS, torch.nan)))
        self.steps += 1
        self.state = advance(state, row_BS)
        # Content of no frames owes no ramp-out; the state's own test waits for one.
        empty_B = self.state.finish == 0
        done_B = self.active_B & (self.state.is_done | empty_B | sampled.failed)
        self.active_B = self.active_B & ~done_B
        for b in done_B.nonzero()[:, 0].tolist():
            self.outcome[self.origin[b]] = _Outcome(
                self.steps, int(self.state.finish[b]), bool(sampled.failed[b])
            )
        return row_BS, self.active_B

    def select(self, keep_B: Tensor) -> None:
        """Go on with some requests only."""
        self.state = select_state(self.state, keep_B)
        self.known_BRS, self.active_B = self.known_BRS[keep_B], self.active_B[keep_B]
        self.origin = [self.origin[b] for b in keep_B.tolist()]

    def collect(self) -> list[Decoded]:
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
        return [
            self._collect_one(origin, np.concatenate(rows[origin]), np.concatenate(scores[origin]))
            for origin in range(len(self.prompts))
        ]

    def _collect_one(self, origin: int, new_RS: np.ndarray, score_RS: np.ndarray) -> Decoded:
        prompt, outcome, layout = self.prompts[origin], self.outcome[origin], self.layout
        rows_RS = np.concatenate([self.prefix[origin], new_RS[: outcome.steps]])
        score_RS = score_RS[: outcome.steps]
        if outcome.failed:
            message = f"request {prompt.id!r}: the model's logits are not finite in row {len(rows_RS) - 1}."
            return Decoded(rows_RS[:0], rows_RS, "failed", float("nan"), 0, message)
        start = len(prompt.frames_PS) - prompt.num_given
        content_TS = np.full((outcome.frames, layout.num_streams), layout.pad_id, dtype=np.int64)
        num_scored, logprob = 0, 0.0
        for s, delay in enumerate(layout.delays):
            # A stream without content may lie outside the rows; it stays pad.
            part = rows_RS[start + delay : start + outcome.frames + delay, s]
            content_TS[: len(part), s] = part
            frame_R = np.arange(len(self.prefix[origin]), len(rows_RS)) - delay - start
            # Streams ahead of stream 0 may have chosen codes past an end they did not know of.
            mine = ~np.isnan(score_RS[:, s]) & (frame_R < outcome.frames + (s == 0))
            num_scored, logprob = num_scored + int(mine.sum()), logprob + float(score_RS[mine, s].sum())
        ended = self.has_teacher or outcome.frames < prompt.num_given + prompt.max_new
        return Decoded(content_TS, rows_RS, "eos" if ended else "max_len", logprob, num_scored)


@dataclass(frozen=True)
class _Outcome:
    """How a request came to its end: rows generated, content frames, whether its logits were unusable."""

    steps: int
    frames: int
    failed: bool


def _forced_rows(prompt: Prompt, content_TS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """All rows after the prefix when the target's remaining content is given: int64 ``[R, S]``."""
    check_teacher(content_TS, prompt, layout)
    tail = np.full((layout.max_delay + 1, layout.num_streams), layout.pad_id, dtype=np.int64)
    tail[0, 0] = layout.sos_eos_id
    frames = np.concatenate([prompt.frames_PS, content_TS, tail])
    return delayed_rows(frames, len(frames), layout)[len(prompt.frames_PS) + min(layout.delays) :]


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
