"""Parts of a token layout: intervals of ids, streams, and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_SPECIAL = 256

#: Special ids, compatible with the published OpusLM vocabularies.
BASE_SPECIAL = {
    "pad": 0,
    "unk": 1,
    "sos_eos": 5,
    "unknown_task": 7,
    "system": 8,
    "user": 9,
    "assistant": 10,
    "modality:codec": 32,
    "modality:ssl": 33,
    "modality:codec_ssl": 34,
    "modality:text_bpe": 35,
    "modality:g2p": 36,
    "modality:spk": 37,
}


@dataclass(frozen=True)
class Interval:
    """Ids ``start <= id < end`` that belong to ``name`` (``special``, ``ssl``, ``codec0``…, ``text_bpe``)."""

    name: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.name} [{self.start}, {self.end})"


@dataclass(frozen=True)
class Stream:
    """One token stream: its ``delay`` in frames and the names of the intervals it may carry."""

    name: str
    delay: int
    carries: tuple[str, ...]

    def __str__(self) -> str:
        return f"stream {self.name!r} (delay {self.delay}, {'/'.join(self.carries)})"


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch; ascending order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
