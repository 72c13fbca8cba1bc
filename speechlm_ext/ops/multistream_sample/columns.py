"""Columns of the packed tensors of `DecodeState`, in the order that the kernels read them."""

from __future__ import annotations

from enum import IntEnum


class Sampling(IntEnum):
    """Columns of `DecodeState.sampling`."""

    TEMPERATURE = 0
    """0: greedy."""
    TOP_P = 1
    """1: off."""
    MIN_P = 2
    """Relative to the most probable token (Nguyen et al. 2024); 0: off."""
    REPETITION_PENALTY = 3
    """Divides positive and multiplies negative logits of recent ids (Keskar et al. 2019); 1: off."""


class Choice(IntEnum):
    """Columns of `DecodeState.choice`."""

    FIRST_COLUMN = 0
    """First column that the stream may sample."""
    END_COLUMN = 1
    """End of its columns, exclusive; equal to the first: the stream is padding."""
    TOP_K = 2
    """0: off."""
    REPETITION_WINDOW = 3
    """Rows of the stream whose ids the repetition penalty applies to."""


class Limits(IntEnum):
    """Columns of `DecodeState.limits`."""

    MIN_FRAMES = 0
    """Content frames before the segment may end."""
    MAX_FRAMES = 1
    """Content frames after which its end is forced."""
    ROW_LIMIT = 2
    """Row of the request at which its end is forced, if that comes first."""
    MARKER = 3
    """Id in stream 0 before the segment; unused for the first one, whose marker ends the prompt."""


class Request(IntEnum):
    """Columns of `DecodeState.request`."""

    SEED = 0
    NUM_SEGMENTS = 1
    SOURCE = 2
    """Row of the logits to sample from: the request's own, unless it copies another request's tokens."""
    GUIDE = 3
    """Row of the unconditional logits for classifier-free guidance, or -1."""


class Progress(IntEnum):
    """Columns of `DecodeState.progress`."""

    SEGMENT = 0
    """Index of stream 0's current segment."""
    STEP = 1
    """Rows sampled since the segment's frame 0 in a stream without delay."""
    ROW = 2
    """Rows sampled since the request's first row."""
    FINISH = 3
    """Content frames of the segment once its end is sampled, else -1."""
    DONE = 4
    """1 if the request is complete, else 0."""
    FAILED = 5
    """1 if it failed (see `SampledStep.failed`), else 0."""
    ARRIVED = 6
    """Counter by which a GPU's thread blocks find the last of them; 0 between steps."""
