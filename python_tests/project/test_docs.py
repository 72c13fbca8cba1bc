"""Files and functions that the pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from python_tests.project.doc_blocks import PAGES

ROOT = Path(__file__).parents[2]
#: Where a path of a page may begin.
ROOMS = ("", "speechlm_ext", "python_tests", "csrc", "benchmarks", "recipes", "docs")
NAME = re.compile(r"`([\w./-]+\.(?:py|h|cpp|cu|cuh|yaml|html|json))(?::\s?(\w+))?`")
#: Files that a user has or a command writes.
OF_USERS = re.compile(
    r"(^|/)(plan|recipe|tasks|index|fit|config|digests|kmeans|assign|stages|tokenizer|trainer_state|generation_config|tokenizer_config|preprocessor_config|token_layout|scores|lengths|report|about|hub)\.(yaml|json|html)$"
)


def find(path: str) -> Path | None:
    """The file that a page means, or None."""
    found = [ROOT / room / path for room in ROOMS if (ROOT / room / path).is_file()]
    if not found and "/" not in path:  # a bare name, of a file that the text is about
        found = [file for room in ROOMS[1:] for file in (ROOT / room).rglob(path)]
    return found[0] if found else None


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_exist(page: str) -> None:
    missing = []
    for line, text in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
        for path, function in NAME.findall(text):
            if OF_USERS.search(path) or "<" in path:
                continue
            file = find(path)
            if file is None:
                missing.append(f"{page}:{line}: {path}")
            elif function and not re.search(rf"^\s*(def|class) {function}\b", file.read_text("utf-8"), re.M):
                missing.append(f"{page}:{line}: {path}: {function}")
    assert missing == []


def test_every_kind_of_fault_names_a_guard() -> None:
    text = (ROOT / "docs" / "testing.md").read_text("utf-8")
    table = text.split("## Kinds of fault")[1].split("\n## ")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 5
    for guards in rows:
        assert NAME.search(guards), guards
        file = None  # a name alone is a function of the file before it
        for name in re.findall(r"`([^`]+)`", guards):
            if match := NAME.fullmatch(f"`{name}`"):
                file = find(match[1])
            elif file is not None:
                assert re.search(rf"^(def|class) {re.escape(name)}\b", file.read_text("utf-8"), re.M), name
