"""Runs the parts and writes the report; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.report import write_report
from benchmarks.gpu_check.result import Result
from speechlm_ext.utils.console import make_output_safe

ROOT = Path(__file__).resolve().parents[2]
#: Maximum seconds of each part on a GPU; with the start-up they stay below nine minutes.
SECONDS = {"build": 150, "tests": 90, "limits": 30, "bench": 110, "train": 45, "decode": 45, "sanitizer": 60}
TOTAL = 530
#: Factor on all times in a dry run: they only end hanging parts, on a machine that may be busy.
DRY_RUN = 10
TINY = ("--shape", "smoke", "--batches", "1", "2", "--frames", "6")


def run(command: list[str], seconds: float, env: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Run a command in the project's root; returns its exit code (None: out of time) and its output."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            **(env or {}),
        },
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, out
    except subprocess.TimeoutExpired:
        # The whole group: a compiler or a test worker must not run beside the next part.
        os.killpg(process.pid, 9)
        out, _ = process.communicate()
        return None, out


def json_part(module: str, device: str, seconds: float, *options: str) -> Result:
    """A part that prints one JSON object as its last line."""
    code, out = run([sys.executable, "-m", module, "--device", device, *options], seconds)
    last = out.strip().splitlines()[-1] if out.strip() else ""
    if code == 0:
        data = json.loads(last)
        return Result("skipped" if "skipped" in data else "passed", note=data.get("skipped", ""), data=data)
    return _failed(code, out)


def _failed(code: int | None, out: str) -> Result:
    lines = [line for line in out.strip().splitlines() if line.strip()]
    if code is None:
        return Result("timeout", note="; ".join(lines[-1:]), data={"output": lines[-20:]})
    return Result(
        "failed", note=lines[-1][:300] if lines else f"exit code {code}", data={"output": lines[-40:]}
    )


def part_build(device: str, seconds: float) -> Result:
    """Compile ``_C`` for this card alone; on the CPU the build at hand is used."""
    if device == "cpu":
        return Result("skipped", note="the build at hand is used")
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    env = {"SPEECHLM_CUDA": "ON", "SPEECHLM_CUDA_ARCHS": arch}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    user = [] if sys.prefix != sys.base_prefix else ["--break-system-packages"]
    code, out = run([*pip, *user, "-e", "."], seconds, env)
    return Result("passed", note=f"sm_{arch}") if code == 0 else _failed(code, out)


def part_tests(device: str, seconds: float) -> Result:
    """The tests marked ``cuda``; on the CPU one test of one file."""
    choice = ["python_tests/ops", "python_tests/model", "-m", "cuda"]
    if device == "cpu":
        choice = ["python_tests/ops/delay_pack/test_delay_pack.py", "-k", "block_by_hand"]
    code, out = run([sys.executable, "-m", "pytest", *choice, "-q", "-rs", "--tb=short"], seconds)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|error|deselected)[^\n]*", out)
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", out, re.M)
    if code is None or code not in (0, 1):
        return _failed(code, out)
    data = {"summary": summary[-1] if summary else "", "failures": failures, "output": out.splitlines()[-60:]}
    return Result("passed" if code == 0 else "failed", note=data["summary"], data=data)


def part_bench(device: str, seconds: float) -> Result:
    """Every ``benchmarks/ops/bench_*.py`` in a process of its own, each with an even share of the remaining time.

    On the CPU one process has them all: a dry run spends most of its time on imports.
    """
    files = sorted((ROOT / "benchmarks" / "ops").glob("bench_*.py"))
    groups = [files] if device == "cpu" else [[file] for file in files]
    rows: list[dict[str, Any]] = []
    missed: list[str] = []
    deadline = time.monotonic() + seconds
    out_file = ROOT / "build" / "gpu-check-bench.json"
    out_file.parent.mkdir(exist_ok=True)
    status = "passed"
    for number, group in enumerate(groups):
        share = (deadline - time.monotonic()) / (len(groups) - number)
        out_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *map(str, group), "-o", "python_files=bench_*.py", "-q"]
        command += ["--tb=short", "--benchmark-enable", "--benchmark-only", f"--benchmark-json={out_file}"]
        command += ["-k", "smoke and cpu" if device == "cpu" else "cuda"]
        code, out = run(command, share)
        if out_file.is_file() and out_file.stat().st_size:
            for row in json.loads(out_file.read_text("utf-8"))["benchmarks"]:
                rows.append({"name": row["name"], "seconds": row["stats"]["min"], **row["extra_info"]})
        if code != 0:
            reason = "out of time" if code is None else _failed(code, out).note
            missed.append(f"{', '.join(file.stem for file in group)}: {reason}")
            status = "timeout" if code is None and status == "passed" else "failed"
    return Result(status, note="; ".join(missed), data={"rows": rows})


def part_sanitizer(device: str, seconds: float) -> Result:
    """compute-sanitizer's four tools over a small shape of each op."""
    import shutil

    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if device == "cpu" or tool is None:
        return Result(
            "skipped", note="on the CPU" if device == "cpu" else "compute-sanitizer is not installed"
        )
    data, status = {}, "passed"
    deadline = time.monotonic() + seconds
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    for number, name in enumerate(tools):
        share = (deadline - time.monotonic()) / (len(tools) - number)
        small_ops = [sys.executable, "-m", "benchmarks.gpu_check.small_ops"]
        code, out = run([tool, "--tool", name, "--error-exitcode", "86", *small_ops], share)
        found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", out)
        data[name] = "out of time" if code is None else (found[-1] if found else f"exit code {code}")
        if code != 0:
            status = "failed" if code is not None else ("timeout" if status == "passed" else status)
            data[f"{name}_output"] = out.splitlines()[-30:]
    return Result(status, note="; ".join(f"{t}: {data[t]}" for t in tools), data=data)


PARTS: dict[str, Callable[[str, float], Result]] = {
    "build": part_build,
    "tests": part_tests,
    "limits": lambda d, s: json_part("benchmarks.gpu_check.limits", d, s),
    "bench": part_bench,
    "train": lambda d, s: json_part("benchmarks.train.step", d, s),
    "decode": lambda d, s: json_part("benchmarks.generation.decode", d, s, *(TINY if d == "cpu" else ())),
    "sanitizer": part_sanitizer,
}


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; the exit code is 1 if one failed or ran out of time."""
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Everything that a GPU can tell, in one command."
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on tiny shapes"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"maximum seconds in all; default {TOTAL}, {DRY_RUN} times that on the CPU",
    )
    arguments = parser.parse_args(argv)
    patience = DRY_RUN if arguments.device == "cpu" else 1
    seconds = TOTAL * patience if arguments.seconds is None else arguments.seconds
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "gpu-check: no CUDA device, or a torch without CUDA; --device cpu is a dry run",
                file=sys.stderr,
            )
            return 2
    start = time.monotonic()
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    results: dict[str, Result] = {}
    for name in [p for p in PARTS if p in arguments.parts]:
        left = seconds - (time.monotonic() - start)
        if left < 5:
            results[name] = Result("skipped", note="no time was left")
            continue
        print(f"[{time.monotonic() - start:4.0f} s] {name} …", flush=True)
        part_start = time.monotonic()
        try:
            results[name] = PARTS[name](arguments.device, min(SECONDS[name] * patience, left))
        except Exception as error:  # noqa: BLE001 - a broken part must not hide the others
            results[name] = Result("failed", note=f"{type(error).__name__}: {error}"[:300])
        results[name].seconds = round(time.monotonic() - part_start, 1)
        paths = write_report(arguments.out, arguments.device, started, results)
    print(paths[1].read_text("utf-8"))
    print(f"wrote {paths[0]} and {paths[1]}; {time.monotonic() - start:.0f} s in all")
    return 1 if any(r.status in ("failed", "timeout") for r in results.values()) else 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
