"""compute-sanitizer's four tools, at once: over small shapes of each op, and over kernels with planted faults.

Only kernels of ours are instrumented, by the namespace in their names. Memory comes from the driver, allocation by
allocation: torch's cache hands out pieces of large ones, and an overrun into the next piece is no fault to the tool. A
tool counts only if it finds the fault planted for it (``planted.cu``) with the same options.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.process import ROOT, Child, Outcome, Row, watch

#: In order of value.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EXIT_CODE = 86
NAMESPACE = "speechlm"
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.M)


def find_tool(device: str) -> str | None:
    """compute-sanitizer: ``COMPUTE_SANITIZER``, or on a GPU what is on PATH or in /usr/local/cuda."""
    if named := os.environ.get("COMPUTE_SANITIZER"):
        return named
    if device == "cpu":
        return None
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def command_of(executable: str, tool: str, program: list[str], help_text: str) -> list[str]:
    """The command line that runs ``program`` under a tool; older versions name the filter of kernels otherwise."""
    option = "--kernel-name" if "--kernel-name" in help_text else "--kernel-regex"
    words = [executable, "--tool", tool, "--error-exitcode", str(EXIT_CODE), "--print-limit", "20"]
    if tool == "memcheck" and "--padding" in help_text:  # else an overrun into the next allocation is none
        words += ["--padding", "512"]
    return [*words, option, f"kns={NAMESPACE}", *program]


def environment_of(tool: str) -> dict[str, str]:
    """Variables of a run: without torch's cache where a tool looks at global memory."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}


@dataclass(frozen=True)
class Finding:
    """What a tool says of a program."""

    num_errors: int | None
    """Errors or hazards; None: no summary came."""
    first: list[str]
    """The first lines of the first errors."""


def read_output(text: str) -> Finding:
    """The finding in the output of a tool."""
    found = _SUMMARY.findall(text)
    lines = [line.lstrip("= ").rstrip() for line in text.splitlines() if line.startswith("=========")]
    is_error = re.compile(
        r"Invalid|Race reported|Error: |Uninitialized|Barrier error|Program hit|hazard|leaked"
    )
    errors = [line for line in lines if is_error.search(line) and "SUMMARY" not in line]
    # A summary for each process of the program.
    return Finding(sum(map(int, found)) if found else None, errors[:6])


def build_planted(folder: Path) -> Path | str:
    """The program with planted faults, compiled for this card; a sentence if that cannot be done."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return "nvcc is not installed"
    out = folder / "planted"
    command = [
        nvcc,
        "-arch=native",
        "-lineinfo",
        "-o",
        str(out),
        str(ROOT / "benchmarks/gpu_check/planted.cu"),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    return out if done.returncode == 0 else f"nvcc: {(done.stderr.strip() or str(done.returncode))[-300:]}"


def run_tool(
    executable: str, tool: str, device: str, planted: Path | str, folder: Path, seconds: float, help_text: str
) -> tuple[Row, list[Child]]:
    """The row of a tool, and the children that ran."""
    children: list[Child] = []

    def run(name: str, program: list[str], seconds: float) -> tuple[Outcome, Finding, list[Row]]:
        command = command_of(executable, tool, program, help_text)
        children.append(Child(name, command, folder, environment_of(tool)))
        rows: list[Row] = []
        outcome = watch(children[-1], seconds, rows.append)
        return outcome, read_output(children[-1].log.read_text("utf-8", errors="replace")), rows

    row: Row = {"tool": tool}
    if isinstance(planted, str):
        row["planted"] = f"not run: {planted}"
    else:
        outcome, finding, _ = run(f"planted-{tool}", [str(planted), tool], min(30, seconds / 2))
        row["planted"] = "found" if finding.num_errors else f"missed: {outcome.note}"
    ops = [sys.executable, "-m", "benchmarks.gpu_check.small_ops", "--device", device]
    outcome, finding, rows = run(f"sanitizer-{tool}", ops, seconds)
    done = [r["op"] for r in rows if "op" in r]
    row |= {"errors": finding.num_errors, "first": finding.first, "ops": done}
    if outcome.code is None:
        row["error"] = f"out of time; ops done: {', '.join(done) or 'none'}"
    elif finding.num_errors is None:
        row["error"] = f"no summary: {outcome.note or 'the tool wrote none'}"
    elif finding.num_errors or outcome.code != 0:
        row["error"] = f"{finding.num_errors} errors, exit code {outcome.code}"
    elif row["planted"] != "found":
        row["error"] = f"planted fault {row['planted']}"
    return row, children


def run_tools(executable: str, device: str, folder: Path, seconds: float) -> list[tuple[Row, list[Child]]]:
    """The rows of all tools, which run side by side."""
    asked = subprocess.run(
        [executable, "--help"], capture_output=True, encoding="utf-8", errors="replace", timeout=30
    )
    planted = build_planted(folder)
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        jobs = [
            pool.submit(run_tool, executable, tool, device, planted, folder, seconds, asked.stdout)
            for tool in TOOLS
        ]
        return [job.result() for job in jobs]
