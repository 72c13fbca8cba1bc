"""What the pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_guard_and_test_of_the_kinds_of_fault_exists() -> None:
    text = (ROOT / "docs" / "testing.md").read_text("utf-8")
    table = text.split("## Kinds of fault")[1].split("\n## ")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 5
    for guards in rows:
        file = None
        for name in re.findall(r"`([^`]+)`", guards):
            path, _, function = name.partition(":")
            if path.endswith(".py"):
                file = next(
                    (p for p in (ROOT / "speechlm_ext" / path, ROOT / "python_tests" / path) if p.is_file()),
                    None,
                )
                assert file is not None, name
            else:
                path, function = "", name
            if function:
                assert file is not None
                defined = re.search(rf"^(def|class) {re.escape(function)}\b", file.read_text("utf-8"), re.M)
                assert defined, f"{name} is not in {file}"
