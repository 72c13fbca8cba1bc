"""Delayed rows and undelayed frames: the rows of a prompt, and the frames of decoded rows.

The decoder works on delayed rows. Row r of stream s holds undelayed frame ``u = r - delay[s]``. With P the prompt's
frames and E the frame of the target's end token, its token is

    u < P         the prompt's, pad before the first: ramp-in, lagging codes of a continued beginning
    P <= u < E    sampled, from the stream's own range only
    u = E         the end token in stream 0, pad in the others
    u > E         pad; for a task with several targets ``max_delay`` frames of it, the next marker, and so on

Streams delayed behind stream 0 emit their last frames after its end (ramp-out); those with its delay end in the same
row. So a decoded sequence has, row by row, the form that training packs.

Axes: R delayed rows, P prompt frames, T content frames, S streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.encode_fields import content_streams
from speechlm_ext.generation.requests.prompt import Prompt, pad_frames, special_frame
from speechlm_ext.layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Decoded:
    """The decoded targets of one prompt, in layout ids."""

    content_TS: np.ndarray
    """int64 ``[T, S]``: the last target's frames, undelayed, with a continued beginning and without the end."""
    rows_RS: np.ndarray
    """int64 ``[R, S]``: all delayed rows with the prompt's, up to the last one with a token."""
    finished: str
    """``eos``, ``max_len`` (of the last target) or ``failed``."""
    logprob: float
    """Sum over the sampled tokens of all targets; an end counts unless it was forced."""
    num_scored: int
    """Number of tokens in ``logprob``."""
    logprob_TS: np.ndarray
    """float32 ``[T, S]``: log-probability of each code of the last target, forced ones too; NaN for pads and for the
    continued beginning."""
    end_logprob: float = float("nan")
    """Log-probability of the last target's end."""
    intermediate: tuple[np.ndarray, ...] = ()
    """Earlier targets' frames, as ``content_TS``."""
    error: str | None = None


def failed_result(
    prompt: Prompt, message: str, layout: TokenLayout, rows_RS: np.ndarray | None = None
) -> Decoded:
    """Result of a failed request; ``rows_RS``: rows decoded before the failure, with the prompt's."""
    rows_RS = prefix_rows(prompt.frames_PS, layout) if rows_RS is None else rows_RS
    return Decoded(
        content_TS=rows_RS[:0],
        rows_RS=rows_RS,
        finished="failed",
        logprob=float("nan"),
        num_scored=0,
        logprob_TS=rows_RS[:0].astype(np.float32),
        error=message,
    )


def delayed_rows(frames_PS: np.ndarray, num_rows: int, layout: TokenLayout, unknown: int = -1) -> np.ndarray:
    """The first ``num_rows`` delayed rows of a sequence that begins with ``frames_PS``: int64 ``[R, S]``.

    Tokens of later frames are ``unknown``.
    """
    rows_RS = np.empty((num_rows, layout.num_streams), dtype=np.int64)
    for s, delay in enumerate(layout.delays):
        u_R = np.arange(num_rows) - delay
        known = np.where(u_R < 0, layout.pad_id, frames_PS[np.clip(u_R, 0, len(frames_PS) - 1), s])
        rows_RS[:, s] = np.where(u_R >= len(frames_PS), unknown, known)
    return rows_RS


def prefix_rows(frames_PS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The delayed rows before the first sampled token, which hold nothing but the prompt: int64 ``[R, S]``."""
    return delayed_rows(frames_PS, len(frames_PS) + min(layout.delays), layout)


def partial_rows(frames_PS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Rows after the prefix in which some streams still have the prompt: int64 ``[R, S]``, -1 in the others."""
    lag = layout.max_delay - min(layout.delays)
    if lag == 0:
        return np.empty((0, layout.num_streams), dtype=np.int64)
    return delayed_rows(frames_PS, len(frames_PS) + layout.max_delay, layout)[-lag:]


def forced_rows(prompt: Prompt, content_TS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """All rows after the prefix for a target's remaining content ``[T, S]``: int64 ``[R, S]``."""
    if len(prompt.segments) > 1:
        raise GenerationError(f"request {prompt.id!r}: content can be forced for tasks with one target only.")
    for s, ids in enumerate(layout.content_ranges(prompt.modality)):
        start, end = (layout.pad_id, layout.pad_id + 1) if ids is None else ids
        column = content_TS[:, s]
        bad = (column < start) | (column >= end)
        if bad.any():
            raise GenerationError(
                f"request {prompt.id!r}: forced frame {int(bad.argmax())} has id {int(column[bad.argmax()])} "
                f"in stream {s}, outside [{start}, {end}) of {prompt.modality}."
            )
    end_frame, pads = special_frame(layout.sos_eos_id, layout), pad_frames(layout.max_delay, layout)
    frames = np.concatenate([prompt.frames_PS, content_TS, end_frame, pads])
    return delayed_rows(frames, len(frames), layout)[len(prompt.frames_PS) + min(layout.delays) :]


def undelayed(
    values_RS: np.ndarray, first: int, count: int, delays: Sequence[int], missing: Any
) -> np.ndarray:
    """Frames ``first`` to ``first + count`` of delayed rows ``[R, S]``: ``[count, S]``.

    Streams without content may end before the rows do; their frames are ``missing``.
    """
    out_TS = np.full((count, len(delays)), missing, dtype=values_RS.dtype)
    for s, delay in enumerate(delays):
        column = values_RS[first + delay : first + delay + count, s]
        out_TS[: len(column), s] = column
    return out_TS


def find_end(rows_RS: np.ndarray, first: int, layout: TokenLayout) -> int | None:
    """Content frames of the target whose frame 0 is frame ``first`` of the rows; None before its end token."""
    # A continued beginning holds no end token.
    ends = np.flatnonzero(rows_RS[first + layout.delays[0] :, 0] == layout.sos_eos_id)
    return int(ends[0]) if len(ends) else None


class FrameReader:
    """Undelays a request's rows as they arrive, into frames of its last target.

    Args:
        prompt: its own rows count as read; a continued beginning is part of the target.
    """

    def __init__(self, prompt: Prompt, layout: TokenLayout) -> None:
        self._layout = layout
        self._rows_RS = prefix_rows(prompt.frames_PS, layout)
        self._num_prefix = len(self._rows_RS)
        self._modalities = [segment.modality for segment in prompt.segments]
        """Of the current target and those after it."""
        self._first = len(prompt.frames_PS) - prompt.num_given
        """Frame of the sequence that is the current target's frame 0."""
        self._next = 0
        """The target's next frame to return."""

    @property
    def num_rows(self) -> int:
        """Rows read, the prompt's included."""
        return len(self._rows_RS)

    @property
    def num_new_rows(self) -> int:
        """Rows read after the prompt's."""
        return len(self._rows_RS) - self._num_prefix

    def rows_until(self, count: int) -> int:
        """Minimum number of rows to read before ``count`` more frames are complete."""
        slowest = max(self._layout.delays[s] for s in content_streams(self._modalities[0], self._layout))
        return self._first + self._next + count + slowest - self.num_rows

    def push(self, new_RS: np.ndarray) -> np.ndarray:
        """Read the next rows int64 ``[R, S]``; returns the frames that are complete now, int64 ``[T, S]``."""
        self._rows_RS = np.concatenate([self._rows_RS, new_RS])
        end = find_end(self._rows_RS, self._first, self._layout)
        while end is not None and len(self._modalities) > 1:
            self._first += end + self._layout.max_delay + 2
            del self._modalities[0]
            end = find_end(self._rows_RS, self._first, self._layout)
        num_complete = self._next + 1 - self.rows_until(1)
        stop = num_complete if end is None else min(num_complete, end)
        if stop <= self._next or len(self._modalities) > 1:
            return pad_frames(0, self._layout)
        start, self._next = self._next, stop
        first = self._first + start
        return undelayed(self._rows_RS, first, stop - start, self._layout.delays, self._layout.pad_id)


def read_decoded(
    prompt: Prompt,
    forced_RS: np.ndarray,
    new_RS: np.ndarray,
    logprob_RS: np.ndarray,
    layout: TokenLayout,
    has_failed: bool,
) -> Decoded:
    """Undelay a request's rows into its targets' frames.

    Args:
        forced_RS: the known rows after the prefix, -1 where a token was sampled; may be fewer than the new ones.
        new_RS: int64 ``[R, S]``, the rows after the prefix.
        logprob_RS: float32 ``[R, S]``, NaN where a stream had no content.
        has_failed: the request ended because its logits are not finite.
    """
    prefix_RS = prefix_rows(prompt.frames_PS, layout)
    rows_RS = np.concatenate([prefix_RS, new_RS])
    if has_failed:
        message = f"request {prompt.id!r}: the model's logits are not finite in row {len(rows_RS) - 1}."
        return failed_result(prompt, message, layout, rows_RS)
    # Scores of the prompt's rows, so that all arrays count rows alike.
    logprob_RS = np.concatenate([np.full(prefix_RS.shape, np.nan, dtype=np.float32), logprob_RS])
    is_forced_RS = np.zeros(rows_RS.shape, dtype=bool)
    is_forced_RS[len(prefix_RS) :][: len(forced_RS)] = forced_RS[: len(new_RS)] >= 0
    is_sampled_RS = ~is_forced_RS & ~np.isnan(logprob_RS)
    first = len(prompt.frames_PS) - prompt.num_given  # frame of the sequence that is the target's frame 0
    num_scored, logprob, contents = 0, 0.0, []
    for number, segment in enumerate(prompt.segments):
        end = find_end(rows_RS, first, layout)
        assert end is not None
        contents.append(undelayed(rows_RS, first, end, layout.delays, layout.pad_id))
        logprob_TS = undelayed(logprob_RS, first, end, layout.delays, np.nan)
        is_sampled_TS = undelayed(is_sampled_RS, first, end, layout.delays, False)
        for s in range(layout.num_streams):
            scores = logprob_TS[is_sampled_TS[:, s], s]
            num_scored += scores.size
            logprob += float(scores.sum(dtype=np.float64))
        end_row = first + layout.delays[0] + end
        end_logprob = float(logprob_RS[end_row, 0])
        longest = segment.max_new + (prompt.num_given if number == 0 else 0)
        is_cut = end >= longest or end >= segment.row_limit - first
        if not is_cut and not is_forced_RS[end_row, 0]:
            num_scored += 1
            logprob += end_logprob
        first += end + layout.max_delay + 2
    return Decoded(
        content_TS=contents[-1],
        rows_RS=rows_RS,
        finished="max_len" if is_cut and not is_forced_RS[end_row, 0] else "eos",
        logprob=logprob,
        num_scored=num_scored,
        logprob_TS=logprob_TS,
        end_logprob=end_logprob,
        intermediate=tuple(contents[:-1]),
    )
