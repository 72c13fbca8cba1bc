"""Text: numbers with their nouns, and scripts without spaces."""

from __future__ import annotations

#: Letters of the scripts that put no spaces between words (Thai, Lao, Khmer, Burmese, Chinese, Japanese), as a set for
#: the ``regex`` library.
NO_SPACES = r"[\p{Line_Break=SA}\p{Han}\p{Hiragana}\p{Katakana}\u30fc]"


def counted(count: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
