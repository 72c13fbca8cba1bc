"""compute-sanitizer's part of a GPU check, with a stand-in for the tool that prints what it prints."""

from __future__ import annotations

import pytest

from benchmarks.gpu_check import parts, report, sanitizer

BAD = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at speechlm::<unnamed>::pack_kernel(speechlm::Args)+0x150 in delay_pack_cuda.cu:61
=========     by thread (31,0,0) in block (0,0,0)
=========     Access at 0x7f2c6fa00200 is out of bounds
=========     and is 113 bytes after the nearest allocation at 0x7f2c6fa00000 of size 400 bytes
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at speechlm::race(int *)+0x70 in planted.cu:17
=========     and Read access at speechlm::race(int *)+0xa0 in planted.cu:18 [512 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
#: What initcheck says of a library's kernel, and of one of ours.
UNINITIALIZED = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cutlass::Kernel2<gemm>(gemm::Params)+0x3a0
=========     by thread (31,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void speechlm::<unnamed>::settle<float>(speechlm::Args)+0x10 in kmeans_rescore_cuda.cu:61
=========     by thread (1,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
LIBRARY = "".join(UNINITIALIZED.splitlines(True)[:5]) + "========= ERROR SUMMARY: 1 error\n"
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = (
    "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)


@pytest.mark.parametrize(
    ("text", "number", "first"),
    [
        (BAD, 1, "Invalid __global__ write of size 4 bytes"),
        (RACE, 1, "Error: Race reported between Write access at speechlm::race(int *)+0x70 in planted.cu:17"),
        (UNINITIALIZED, 1, "Uninitialized __global__ memory read of size 4 bytes at void speechlm::"),
        (LIBRARY, 0, None),
        # More errors than were printed: those that nobody has seen count.
        (LIBRARY.replace("1 error", "900 errors"), 899, None),
        ("========= Warning: no backtrace\n" + CLEAN, 0, None),
        (CLEAN, 0, None),
        (CLEAN_RACE, 0, None),
        (CLEAN + BAD, 1, "Invalid __global__ write of size 4 bytes"),
        ("a program's own lines\n", None, None),
    ],
)
def test_the_tools_output_is_read(text, number, first):
    found = sanitizer.read_output("a line of the program\n" + text)
    assert found.num_errors == number and bool(found.first) == bool(first)
    assert first is None or found.first[0].startswith(first)


#: Prints what the tool would: planted faults are found, ops are clean, unless a variable of the test says otherwise.
STAND_IN = """#!/usr/bin/env python3
import json, os, sys, time
words = sys.argv[1:]
if "--help" in words:
    print("  --kernel-name arg   kernels\\n  --padding arg"); sys.exit(0)
tool, is_planted = words[words.index("--tool") + 1], any(w.endswith("planted") for w in words)
mode = os.environ.get("STAND_IN_" + tool.upper(), "")
assert ("kns=speechlm" in words) == (tool != "initcheck"), words
assert ("--padding" in words) == (tool == "memcheck"), words
cached = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
assert cached == (tool in ("racecheck", "synccheck")), tool
bad, clean = (sys.argv[0] + ".race", sys.argv[0] + ".clean_race") if tool == "racecheck" else (
    sys.argv[0] + ".bad", sys.argv[0] + ".clean")
if mode == "hangs" and not is_planted: time.sleep(300)
if mode == "silent": sys.exit(0)
finds = (is_planted and mode != "blind") or (mode == "finds" and not is_planted)
print(open(bad if finds else clean).read())
if not is_planted:
    open(os.environ["SPEECHLM_ROWS"], "a").write(json.dumps({"op": "multistream_sample"}) + "\\n")
sys.exit(86 if finds else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the part with the stand-in; gives status, note and rows by tool."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN, "utf-8")
    tool.chmod(0o755)
    for name, text in {"bad": BAD, "race": RACE, "clean": CLEAN, "clean_race": CLEAN_RACE}.items():
        (tmp_path / f"compute-sanitizer.{name}").write_text(text, "utf-8")
    monkeypatch.setenv("COMPUTE_SANITIZER", str(tool))
    monkeypatch.setattr(sanitizer, "build_planted", lambda folder: folder / "planted")

    def run_part(seconds=20.0, **modes):
        for name, mode in modes.items():
            monkeypatch.setenv(f"STAND_IN_{name.upper()}", mode)
        recorder = report.Recorder(tmp_path / "report.jsonl")
        recorder.write(
            "run", device="c", dry_run=False, started="1", commit="c", machine={}, parts=["sanitizer"]
        )
        check = parts.Check("cuda", False, recorder, tmp_path / "work", tmp_path / "log.txt")
        status, note = parts.part_sanitizer(check, seconds)
        rows = report.read_runs([tmp_path / "report.jsonl"])[-1]["parts"]["sanitizer"]["rows"]
        return status, note, {row["tool"]: row for row in rows}

    return run_part


def test_clean_ops_pass_if_every_tool_finds_its_planted_fault(run, tmp_path):
    status, note, rows = run()
    assert (status, note) == ("passed", "") and list(rows) == list(sanitizer.TOOLS)
    assert all(
        row["planted"] == "found" and row["errors"] == 0 and "error" not in row for row in rows.values()
    )
    assert rows["memcheck"]["ops"] == ["multistream_sample"]
    assert "==== planted-racecheck" in (tmp_path / "log.txt").read_text("utf-8")


def test_each_way_to_fail_is_named(run):
    status, note, rows = run(
        seconds=4.0, memcheck="finds", racecheck="hangs", initcheck="blind", synccheck="silent"
    )
    assert status == "failed"
    assert (
        rows["memcheck"]["error"] == "1 errors, exit code 86"
        and "Invalid __global__" in rows["memcheck"]["first"][0]
    )
    assert rows["racecheck"]["error"] == "out of time; ops done: none"
    assert rows["initcheck"]["error"].startswith("planted fault missed") and rows["initcheck"]["errors"] == 0
    assert rows["synccheck"]["error"].startswith("no summary")
    assert note.count(";") >= 3


def test_a_tool_without_a_planted_fault_proves_nothing(run, monkeypatch):
    monkeypatch.setattr(sanitizer, "build_planted", lambda folder: "nvcc is not installed")
    status, note, rows = run()
    assert status == "failed" and "memcheck: planted fault not run: nvcc is not installed" in note


def test_older_versions_name_the_filter_otherwise():
    command = sanitizer.command_of("cs", "memcheck", ["p"], "--kernel-regex arg")
    assert command[-3:] == ["--kernel-regex", "kns=speechlm", "p"] and "--padding" not in command
