"""Runs the parts and writes the report; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import PARTS, Check
from benchmarks.gpu_check.process import ROOT, Child, watch
from benchmarks.gpu_check.report import Recorder, add_to_history, as_markdown, read_runs
from speechlm_ext.utils.console import make_output_safe
from speechlm_ext.utils.files.io import atomic_write_text, make_folder
from speechlm_ext.utils.machine import commit_of, describe_machine

#: Parts of the two runs.
RUNS = {1: ("build", "limits", "kernels", "decode", "tests"), 2: ("build", "sanitizer", "train", "bench")}
#: Maximum seconds of each part on a GPU, and of a run, its start and its report included.
SECONDS = {
    "build": 120, "limits": 20, "kernels": 75, "decode": 60, "tests": 90, "sanitizer": 150, "train": 45, "bench": 150,
}  # fmt: skip
RUN_SECONDS = 262
#: Factor on all times in a dry run: they only end hanging parts, on a machine that may be busy.
DRY_RUN = 10


def describe(device: str, folder: Path) -> dict[str, Any]:
    """What torch says of the device, from a process of its own: this one never waits for a driver."""
    found: dict[str, Any] = {}
    module = [sys.executable, "-m", "benchmarks.gpu_check.limits", "--device", device, "--describe"]
    outcome = watch(Child("describe", module, folder), 60, found.update)
    return found if outcome.status == "passed" else {"missing": f"torch cannot be asked: {outcome.note}"}


def run_part(check: Check, name: str, seconds: float) -> str:
    """Run a part and record it; returns its status."""
    check.recorder.write("begin", part=name)
    check.output, begun = [], time.monotonic()
    try:
        status, note = PARTS[name](check, seconds)
    except Exception as error:  # noqa: BLE001 - a broken part must not hide the others
        status, note = "failed", f"{type(error).__name__}: {error}"[:300]
    output = check.output if status in ("failed", "timeout") else []
    took = round(time.monotonic() - begun, 1)
    check.recorder.write("end", part=name, status=status, seconds=took, note=note, output=output)
    return status


def write_reports(record: Path, results: Path) -> str:
    """The Markdown beside the record, and the runs in the device's history; returns the Markdown."""
    runs = read_runs([record])
    text = as_markdown(runs)
    atomic_write_text(record.with_name("report.md"), text)
    add_to_history(runs, results)
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Everything that a GPU can tell, in two runs."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--shapes", choices=("full", "tiny"), help="default: full on a GPU, tiny on the CPU")
    parser.add_argument("--part", type=int, choices=(1, 2), help="the first or the second run; default: both")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="these parts alone")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the record and the reports; default: $OUT, else benchmarks/out and results",
    )
    parser.add_argument("--seconds", type=float, help=f"maximum in all; default {RUN_SECONDS} a run")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="report of these record files; runs nothing"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts; the exit code is 1 if one failed or ran out of time."""
    start = time.monotonic()
    arguments = parse(argv)
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if arguments.report:
        try:
            runs = read_runs(arguments.report)
            kept = [run for run in runs if out is not None or not run["dry_run"]]
            paths = add_to_history(kept, out or ROOT / "benchmarks" / "results")
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        print(as_markdown(runs), *(f"in {path}" for path in paths), sep="\n")
        return 0
    device = arguments.device
    if device == "cpu":  # a dry run leaves a GPU alone
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    records = out or ROOT / "benchmarks" / "out" / "gpu-check"
    results = out or (records if device == "cpu" else ROOT / "benchmarks" / "results")
    make_folder(records)
    folder = ROOT / "build" / "gpu-check" / f"run-{os.getpid()}"
    found = describe(device, folder)
    if "missing" in found:
        print(f"gpu-check: {found['missing']}; --device cpu is a dry run", file=sys.stderr)
        return 2
    machine: dict[str, Any] = describe_machine() | found
    wanted = arguments.parts or RUNS.get(arguments.part) or PARTS
    names = [name for name in PARTS if name in wanted]
    check = Check(
        device=device,
        is_tiny=(arguments.shapes or ("tiny" if device == "cpu" else "full")) == "tiny",
        recorder=Recorder(records / "report.jsonl"),
        folder=folder,
        log=records / "log.txt",
        patience=DRY_RUN if device == "cpu" else 1,
        num_workers=0 if device == "cpu" else 6,
    )
    check.recorder.write(
        "run",
        device=str(found.get("gpu") or machine["processor"]),
        dry_run=device == "cpu",
        started=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        commit=os.environ.get("SPEECHLM_GIT_COMMIT") or commit_of(ROOT),
        machine=machine,
        parts=names,
    )
    default = RUN_SECONDS * check.patience * (1 if arguments.part else 2)
    total = default if arguments.seconds is None else arguments.seconds
    status: dict[str, str] = {}
    for name in names:
        left = total - (time.monotonic() - start)
        if left < 3:
            break
        if status.get("build") in ("failed", "timeout") and name != "limits":
            check.recorder.write(
                "end", part=name, status="skipped", seconds=0, note="there is no build for this card"
            )
            continue
        print(f"[{time.monotonic() - start:4.0f} s] {name} …", flush=True)
        status[name] = run_part(check, name, min(SECONDS[name] * check.patience, left))
        write_reports(records / "report.jsonl", results)
    print(write_reports(records / "report.jsonl", results))
    print(
        f"wrote {records / 'report.jsonl'} and {records / 'report.md'}; {time.monotonic() - start:.0f} s in all"
    )
    return 1 if len(status) < len(names) or {"failed", "timeout"} & set(status.values()) else 0


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
