"""Words for numbers in messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
