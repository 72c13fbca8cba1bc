"""Counts all cases; budgets.json, which holds the counts by name, and the table of docs/ops/budgets.md.

A count depends on the versions of torch and transformers, which the file records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from python_tests.cuda_on_cpu.launches import cases, model_cases
from python_tests.cuda_on_cpu.launches.cases import Case
from python_tests.cuda_on_cpu.launches.recorder import Counts
from python_tests.cuda_on_cpu.launches.simulated_cuda import DEVICE, simulated_cuda

BUDGETS = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).parents[3] / "docs" / "ops" / "budgets.md"
BEGIN, END = "<!-- budgets: begin -->", "<!-- budgets: end -->"
CASES = [*cases.CASES, *model_cases.CASES]
UPDATE = "run `python -m python_tests.cuda_on_cpu.launches --update` and commit what it changes"


def title(case: Case) -> str:
    """The case's key in budgets.json."""
    return f"{case.page}: {case.name}"


def count(case: Case) -> Counts:
    """Counts of a case on the simulated device."""
    with simulated_cuda(case.is_capturing) as recorder:
        call = case.setup(DEVICE)
        recorder.counts = Counts()
        call()
        return recorder.counts


def versions() -> dict[str, str]:
    """What the counts depend on besides this package."""
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def measure() -> dict[str, Any]:
    """The content of budgets.json."""
    counts = {title(case): count(case) for case in CASES}
    return {
        "versions": versions(),
        "cases": {
            name: {part: dict(sorted(vars(found)[part].items())) for part in ("aten", "own", "syncs")}
            for name, found in counts.items()
        },
    }


def differences(budget: dict[str, dict[str, int]], found: dict[str, dict[str, int]]) -> list[str]:
    """What a case does more or less than its budget, a line for each name."""
    lines = []
    for part in ("aten", "own", "syncs"):
        before, now = Counter(budget[part]), Counter(found[part])
        lines += [
            f"{part}: {name}: {before[name]} -> {now[name]}"
            for name in sorted(before | now)
            if before[name] != now[name]
        ]
    return lines


def _totals(case: dict[str, dict[str, int]]) -> tuple[int, int, int]:
    aten, own, syncs = (sum(case[part].values()) for part in ("aten", "own", "syncs"))
    return aten, own, syncs


def _linear(values: list[int]) -> str:
    """``a + b L`` of the values at ``LAYERS``."""
    first, *rest = values
    slope = rest[0] - first
    steps = [layers - model_cases.LAYERS[0] for layers in model_cases.LAYERS]
    if values != [first + slope * step for step in steps]:
        raise ValueError(f"counts at {model_cases.LAYERS} layers are not linear: {values}")
    constant = first - slope * model_cases.LAYERS[0]
    return f"{constant} + {slope} L" if slope else str(constant)


def render(budgets: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["| | launches | of them ours | syncs |", "|---|---|---|---|"]
    stored = budgets["cases"]
    for case in cases.CASES:
        aten, own, syncs = _totals(stored[title(case)])
        lines.append(f"| {case.page}: {case.name} | {aten + own} | {own} | {syncs} |")
    for name in model_cases.DEPTHS:
        found = [_totals(stored[title(model_cases.at_depth(name, n))]) for n in model_cases.LAYERS]
        launches, own, syncs = (
            _linear(list(column)) for column in zip(*((a + o, o, s) for a, o, s in found), strict=True)
        )
        lines.append(f"| {name}, L layers | {launches} | {own} | {syncs} |")
    for case in model_cases.CASES[len(model_cases.DEPTHS) * len(model_cases.LAYERS) :]:
        aten, own, syncs = _totals(stored[title(case)])
        lines.append(f"| {case.page}: {case.name} | {aten + own} | {own} | {syncs} |")
    return "\n".join(lines)


def page_table(page: str) -> str:
    """The table in the text of docs/ops/budgets.md."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m python_tests.cuda_on_cpu.launches", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write budgets.json and the page's table")
    parser.add_argument("--json", action="store_true", help="print the counts by name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    budgets = measure()
    print(json.dumps(budgets, indent=1) if arguments.json else render(budgets))
    if arguments.update:
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n", "utf-8")
        page = PAGE.read_text("utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{render(budgets)}\n{END}{rest.split(END)[1]}", "utf-8")
        print(f"wrote {BUDGETS.name} and {PAGE.name}", file=sys.stderr)
    return 0
