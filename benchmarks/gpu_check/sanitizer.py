"""compute-sanitizer's four tools, at once: over small shapes of each op, and over kernels with planted faults.

Only kernels of ours are instrumented, by the namespace in their names. initcheck must see all kernels, since memory
that a kernel writes unseen would count as uninitialized; of its errors those in our kernels count. Memory comes from
the driver, allocation by allocation: torch's cache hands out pieces of large ones, and an overrun into the next piece
is no fault to the tool. A tool counts only if it finds the fault planted for it (``planted.cu``) with the same options.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
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
    words = [executable, "--tool", tool, "--error-exitcode", str(EXIT_CODE), "--print-limit", "1000"]
    if tool == "memcheck" and "--padding" in help_text:  # else an overrun into the next allocation is none
        words += ["--padding", "512"]
    return [*words, *([] if tool == "initcheck" else [option, f"kns={NAMESPACE}"]), *program]


def environment_of(tool: str) -> dict[str, str]:
    """Variables of a run: without torch's cache where a tool looks at global memory."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}


@dataclass(frozen=True)
class Finding:
    """What a tool says of a program."""

    num_errors: int | None
    """Errors or hazards, those in kernels of others left out; None: no summary came."""
    first: list[str]
    """The first errors: what and where."""


def read_output(text: str) -> Finding:
    """The finding in the output of a tool."""
    totals = [int(number) for number in _SUMMARY.findall(text)]  # one for each process of the program
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("=========") or re.search("SUMMARY|COMPUTE-SANITIZER|=== Warning", line):
            continue
        words = line.removeprefix("=========")
        if words.strip() and not words.startswith("  "):
            blocks.append([])
        if blocks and words.strip():
            blocks[-1].append(words.strip())
    # An error that names no kernel, of the runtime's interface say, is ours until shown otherwise.
    others = [
        block for block in blocks if _in_kernel(block) and not any(f"{NAMESPACE}::" in line for line in block)
    ]
    ours = [block for block in blocks if block not in others]
    if not sum(totals):
        return Finding(0 if totals else None, [" ".join(block[:2]) for block in ours[:6]])
    return Finding(max(len(ours), sum(totals) - len(others)), [" ".join(block[:2]) for block in ours[:6]])


def _in_kernel(block: list[str]) -> bool:
    """Whether an error's second line says in which kernel it is."""
    return len(block) > 1 and re.match(r"at \S.*\+0x", block[1]) is not None


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
    children, deadline = list[Child](), time.monotonic() + seconds

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
    outcome, finding, rows = run(f"sanitizer-{tool}", ops, deadline - time.monotonic())
    done = [r["op"] for r in rows if "op" in r]
    row |= {"errors": finding.num_errors, "first": finding.first, "ops": done}
    if outcome.code is None:
        row["error"] = f"out of time; ops done: {', '.join(done) or 'none'}"
    elif finding.num_errors is None:
        row["error"] = f"no summary: {outcome.note or 'the tool wrote none'}"
    elif finding.num_errors or outcome.code not in (0, EXIT_CODE):
        row["error"] = f"{finding.num_errors} errors, exit code {outcome.code}"
    elif row["planted"] != "found":
        row["error"] = f"planted fault {row['planted']}"
    return row, children


def run_tools(executable: str, device: str, folder: Path, seconds: float) -> list[tuple[Row, list[Child]]]:
    """The rows of all tools, which run side by side."""
    deadline = time.monotonic() + seconds
    asked = subprocess.run(
        [executable, "--help"], capture_output=True, encoding="utf-8", errors="replace", timeout=30
    )
    help_text, planted = asked.stdout + asked.stderr, build_planted(folder)
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        left = deadline - time.monotonic()
        jobs = [
            pool.submit(run_tool, executable, tool, device, planted, folder, left, help_text)
            for tool in TOOLS
        ]
        return [job.result() for job in jobs]
