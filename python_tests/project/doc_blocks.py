"""Fenced blocks of the pages, and shell lines as lists of words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_ORDER = ("README.md", "CONTRIBUTING.md", "docs/data.md", "docs/training.md", "docs/generation.md")
_ALL = [*_ORDER, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
#: In an order in which each page's commands find what those before them made.
PAGES = tuple(dict.fromkeys(_ALL))


class Block(NamedTuple):
    """One fenced block."""

    language: str
    """After the opening fence; "" for drawings and formulas."""
    text: str
    line: int
    """Of its first line, from 1."""


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


def commands_in(block: Block) -> Iterator[list[str]]:
    """Commands of a shell block as words: lines joined, comments and what follows a pipe dropped, ``&&`` split."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word not in ("&&", "|"):
                words.append(word)
                continue
            if words:
                yield words
            words = []
            if word == "|":
                break
