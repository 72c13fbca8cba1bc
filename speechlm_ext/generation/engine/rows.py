"""Delayed rows and undelayed frames: what is known before decoding, and what was decoded.

The decoder walks delayed rows. In row r, stream s stands at undelayed frame ``u = r - delay[s]``, and one rule says
what belongs there, with P the prompt's frames and E the end (the frame of the target's end token):

    u < P         the prompt's own token, pad before the first: ramp-in, lagging codes of a given beginning
    P <= u < E    a token chosen by the model, from the stream's own range only
    u = E         the end token in stream 0, pad in the others
    u > E         pad; for a task with several targets ``max_delay`` frames of it, the next marker, and so on

Streams that are delayed behind stream 0 still owe their last frames when it ends (ramp-out), and those that are level
with it end in the same row. So a decoded sequence has, row by row, the form that training packs.

Axes: R delayed rows, P prompt frames, T content frames, S streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Decoded:
    """What was decoded for one prompt, in layout ids."""

    content_TS: np.ndarray
    """int64 ``[T, S]``: the last target's frames, undelayed, the given beginning included, the end not."""
    rows_RS: np.ndarray
    """int64 ``[R, S]``: all delayed rows, prompt included, up to the last one with a token."""
    finished: str
    """``eos``, ``max_len`` (of the last target) or ``failed``."""
    logprob: float
    """Sum over the tokens that were chosen, those of earlier targets included; the end counts unless it was forced."""
    num_scored: int
    logprob_TS: np.ndarray
    """float32 ``[T, S]``: log-probability of each code of the last target, forced ones too; NaN for pads and for the
    given beginning."""
    end_logprob: float = float("nan")
    """Of the last target's end."""
    chain: tuple[np.ndarray, ...] = ()
    """Earlier targets' frames, as ``content_TS``."""
    error: str | None = None


def failed(prompt: Prompt, message: str, layout: TokenLayout, rows_RS: np.ndarray | None = None) -> Decoded:
    """What is told of a request that came to nothing; ``rows_RS``: how far it came."""
    rows_RS = prefix_rows(prompt.frames_PS, layout) if rows_RS is None else rows_RS
    nothing = np.empty((0, layout.num_streams), dtype=np.float32)
    return Decoded(rows_RS[:0], rows_RS, "failed", float("nan"), 0, nothing, error=message)


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


def prefix_rows(frames_PS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The delayed rows that hold nothing but the prompt: all before the first token to be chosen."""
    return delayed_rows(frames_PS, len(frames_PS) + min(layout.delays), layout)


def given_rows(frames_PS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Rows after the prefix in which something is known: int64 ``[R, S]``, -1 where a token is to be chosen."""
    lag = layout.max_delay - min(layout.delays)
    if lag == 0:
        return np.empty((0, layout.num_streams), dtype=np.int64)
    return delayed_rows(frames_PS, len(frames_PS) + layout.max_delay, layout)[-lag:]


def forced_rows(prompt: Prompt, content_TS: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """All rows after the prefix when the target's remaining content is given: int64 ``[R, S]``.

    Raises:
        GenerationError: ids outside the target's ranges, or a task with several targets.
    """
    if len(prompt.segments) > 1:
        raise GenerationError(f"request {prompt.id!r}: content can be forced for tasks with one target only.")
    for s, ids in enumerate(layout.content_ranges(prompt.modality)):
        column = content_TS[:, s]
        bad = (column != layout.pad_id) if ids is None else ((column < ids[0]) | (column >= ids[1]))
        if bad.any():
            raise GenerationError(
                f"request {prompt.id!r}: forced frame {int(bad.argmax())} has id {int(column[bad.argmax()])} "
                f"in stream {s}, outside {ids} of {prompt.modality}."
            )
    tail = np.full((layout.max_delay + 1, layout.num_streams), layout.pad_id, dtype=np.int64)
    tail[0, 0] = layout.sos_eos_id
    frames = np.concatenate([prompt.frames_PS, content_TS, tail])
    return delayed_rows(frames, len(frames), layout)[len(prompt.frames_PS) + min(layout.delays) :]


class FrameReader:
    """Undelays a request's rows as they come: frames of its last target, each when all streams with content have it.

    Args:
        prompt: its own rows count as read; a given beginning is part of the target.
    """

    def __init__(self, prompt: Prompt, layout: TokenLayout) -> None:
        self._prompt, self._layout = prompt, layout
        self._rows_RS = prefix_rows(prompt.frames_PS, layout)
        self._num_prefix = len(self._rows_RS)
        #: Frame 0 of the segment, in frames of the sequence; and the next frame of the segment to be given out.
        self._first, self._next = len(prompt.frames_PS) - prompt.num_given, 0
        self._segment = 0

    @property
    def num_rows(self) -> int:
        """Rows read, the prompt's included."""
        return len(self._rows_RS)

    @property
    def num_new_rows(self) -> int:
        """Rows read behind the prompt's."""
        return len(self._rows_RS) - self._num_prefix

    @property
    def _delays(self) -> list[tuple[int, int]]:
        """(stream, delay) of those in which the segment has content."""
        ranges = self._layout.content_ranges(self._prompt.segments[self._segment].modality)
        return [(s, d) for s, d in enumerate(self._layout.delays) if ranges[s] is not None]

    def rows_until(self, count: int) -> int:
        """Rows that must still be read, at least, until there are ``count`` more frames."""
        slowest = max(delay for _, delay in self._delays)
        return self._first + self._next + count + slowest - self.num_rows

    def push(self, new_RS: np.ndarray) -> np.ndarray:
        """Read the next rows int64 ``[R, S]``; returns the frames that are whole now, int64 ``[T, S]``."""
        self._rows_RS = np.concatenate([self._rows_RS, new_RS])
        while True:
            in_stream0 = self._rows_RS[self._first + self._layout.delays[0] :, 0]
            ends = np.flatnonzero(in_stream0 == self._layout.sos_eos_id)
            if not len(ends) or self._segment + 1 == len(self._prompt.segments):
                break
            self._first += int(ends[0]) + self._layout.max_delay + 2
            self._segment += 1
        frames_TS = np.full((0, self._layout.num_streams), self._layout.pad_id, dtype=np.int64)
        if self._segment + 1 < len(self._prompt.segments):
            return frames_TS
        whole = 1 - self.rows_until(1) + self._next
        stop = min(whole, int(ends[0])) if len(ends) else whole
        if stop <= self._next:
            return frames_TS
        frames_TS = np.full(
            (stop - self._next, self._layout.num_streams), self._layout.pad_id, dtype=np.int64
        )
        for s, delay in self._delays:
            frames_TS[:, s] = self._rows_RS[self._first + self._next + delay : self._first + stop + delay, s]
        self._next = stop
        return frames_TS


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
        forced_RS: rows that were given, -1 where not; may be fewer than the new ones.
        new_RS: int64 ``[R, S]``, the rows after the prefix.
        logprob_RS: float32 ``[R, S]``, NaN where a stream had no content.
        has_failed: the request was ended because its logits were unusable.
    """
    prefix_RS = prefix_rows(prompt.frames_PS, layout)
    rows_RS = np.concatenate([prefix_RS, new_RS])
    offset = len(prefix_RS)
    if has_failed:
        message = f"request {prompt.id!r}: the model's logits are not finite in row {len(rows_RS) - 1}."
        return failed(prompt, message, layout, rows_RS)
    is_forced_RS = np.zeros(new_RS.shape, dtype=bool)
    is_forced_RS[: len(forced_RS)] = forced_RS[: len(new_RS)] >= 0
    first = len(prompt.frames_PS) - prompt.num_given  # frame 0 of the segment, in frames of the sequence
    num_scored, logprob, contents = 0, 0.0, []
    for number, segment in enumerate(prompt.segments):
        in_stream0 = rows_RS[first + layout.delays[0] :, 0]
        # A given beginning holds no end.
        end = int(np.flatnonzero(in_stream0 == layout.sos_eos_id)[0])
        given = prompt.num_given if number == 0 else 0
        is_cut = end >= given + segment.max_new or end >= segment.row_limit - first
        content_TS = np.full((end, layout.num_streams), layout.pad_id, dtype=np.int64)
        logprob_TS = np.full((end, layout.num_streams), np.nan, dtype=np.float32)
        for s, delay in enumerate(layout.delays):
            # A stream without content may lie outside the rows; it stays pad.
            part = rows_RS[first + delay : first + end + delay, s]
            content_TS[: len(part), s] = part
            start = (
                first + delay - offset
            )  # row of frame 0 among the new ones; before them for a given beginning
            skip = max(0, -start)
            new = slice(start + skip, max(start + skip, start + end))
            found = logprob_RS[new, s]
            logprob_TS[skip : skip + len(found), s] = found
            chosen = ~np.isnan(found) & ~is_forced_RS[new, s]
            num_scored, logprob = (
                num_scored + int(chosen.sum()),
                logprob + float(found[chosen].sum(dtype=np.float64)),
            )
        end_row = first + layout.delays[0] + end - offset
        end_logprob = float(logprob_RS[end_row, 0])
        if not is_cut and not is_forced_RS[end_row, 0]:
            num_scored, logprob = num_scored + 1, logprob + end_logprob
        contents.append(content_TS)
        first += end + layout.max_delay + 2
    return Decoded(
        contents[-1],
        rows_RS,
        "max_len" if is_cut and not is_forced_RS[end_row, 0] else "eos",
        logprob,
        num_scored,
        logprob_TS,
        end_logprob,
        tuple(contents[:-1]),
    )
