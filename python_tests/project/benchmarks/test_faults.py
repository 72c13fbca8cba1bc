"""What a check of a GPU says of parts that raise, hang, die or print nonsense: each shows, none hides another."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import parts, report
from benchmarks.gpu_check.process import Child

#: A program that hands over a row, and then does what is asked of it.
PROGRAM = """
import json, os, subprocess, sys, time
rows = open(os.environ["SPEECHLM_ROWS"], "a")
def emit(line):
    rows.write(line + "\\n"); rows.flush()
def hang(detached=False):
    # A grandchild that holds the log, in a session of its own, and outlives its parent.
    code = "import os, sys, time; print('grandchild', os.getpid(), flush=True); time.sleep(300)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=detached)
    time.sleep(0.3)
    time.sleep(300)
"""
DEEDS = {
    "good": "emit(json.dumps({'x': 1}))",
    "raises": "emit(json.dumps({'x': 1})); raise RuntimeError('planted')",
    "hangs": "emit(json.dumps({'x': 1})); hang()",
    "detached": "hang(detached=True)",
    "silent": "print('all is well')",
    "killed": "emit(json.dumps({'x': 1})); os.kill(os.getpid(), 9)",
    "nonsense": "emit(json.dumps({'x': 1})); emit('{\"x\": '); emit(json.dumps({'x': 2}))",
    "half": "emit(json.dumps({'x': 1})); rows.write('{\"x\"'); rows.flush(); time.sleep(300)",
}


@pytest.fixture
def recorded(tmp_path):
    """A check that records into ``tmp_path``, and its run as read back."""
    recorder = report.Recorder(tmp_path / "report.jsonl")
    recorder.write(
        "run",
        device="card",
        dry_run=False,
        started="2026-01-01",
        commit="c",
        machine={},
        parts=list(parts.PARTS),
    )
    made = parts.Check("cpu", True, recorder, tmp_path / "work", tmp_path / "log.txt")
    return made, lambda: report.read_runs([tmp_path / "report.jsonl"])[0]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_each_fault_shows_and_the_others_go_on(recorded, monkeypatch):
    made, read = recorded
    deeds = dict(DEEDS)
    names = dict(zip(parts.PARTS, deeds, strict=True))

    def part(deed):
        def run(check, seconds):
            child = Child(deed, [sys.executable, "-c", PROGRAM + deeds[deed]], check.folder)
            outcome = check.watch(next(n for n, d in names.items() if d == deed), child, seconds)
            return outcome.status, outcome.note

        return run

    begun = time.monotonic()
    for name, deed in names.items():
        monkeypatch.setitem(parts.PARTS, name, part(deed))
        check.run_part(made, name, 2.0)
    assert time.monotonic() - begun < 40
    run = read()
    found = {names[name]: (part["status"], part["note"]) for name, part in run["parts"].items()}
    assert found.pop("good") == ("passed", "")
    assert found.pop("raises") == ("failed", "exit code 1; RuntimeError: planted")
    assert found.pop("killed") == ("failed", "killed by signal 9")
    assert found.pop("silent") == ("failed", "no row came; all is well")
    status, note = found.pop("nonsense")
    assert status == "failed" and note.startswith("a row that is no JSON object: '{\"x\": '")
    assert {deed: status for deed, (status, _) in found.items()} == dict.fromkeys(found, "timeout")
    rows_of = {names[name]: [row["x"] for row in part["rows"]] for name, part in run["parts"].items()}
    assert rows_of == {d: [1] for d in DEEDS} | {"silent": [], "detached": [], "nonsense": [1, 2]}
    # Nothing that they started runs on, and what they printed is kept.
    log = made.log.read_text("utf-8")
    pids = [int(line.split()[1]) for line in log.splitlines() if line.startswith("grandchild")]
    assert len(pids) == 2 and not any(map(is_alive, pids))
    text = report.as_markdown([run])
    assert (
        "RuntimeError: planted" in text and text.count("| timeout |") == 3 and text.count("| failed |") == 4
    )


def test_a_part_of_ours_that_raises_is_a_failed_part(recorded, monkeypatch):
    made, read = recorded

    def broken(check, seconds):
        raise RuntimeError("planted")

    monkeypatch.setitem(parts.PARTS, "limits", broken)
    assert check.run_part(made, "limits", 5) == "failed"
    assert read()["parts"]["limits"]["note"] == "RuntimeError: planted"


#: Stands in for the program of the rows: what it does with each name is in the name.
ROWS_PROGRAM = (
    PROGRAM
    + """
for name in sys.argv[sys.argv.index("--rows") + 1:]:
    emit(json.dumps({"begin": name}))
    op, deed = name.split()
    if deed == "hangs": time.sleep(300)
    if deed == "dies": os.kill(os.getpid(), 11)
    if deed == "breaks":
        emit(json.dumps({"name": name, "error": "RuntimeError: illegal memory access"})); sys.exit(3)
    if deed == "lost": continue
    emit(json.dumps({"name": name, "op": op, "shape": deed, "device": "card", "seconds": 1e-3}))
"""
)


def test_a_row_that_hangs_or_dies_costs_that_row(recorded, monkeypatch, tmp_path):
    made, read = recorded
    program = tmp_path / "program.py"
    program.write_text(ROWS_PROGRAM, "utf-8")
    monkeypatch.setattr(
        parts,
        "Child",
        lambda name, command, folder: Child(name, [sys.executable, str(program), *command[3:]], folder),
    )
    names = ["a good", "b hangs", "c good", "d dies", "e breaks", "f good", "g lost", "h good"]
    status, note = parts.run_rows(made, "kernels", names, 60, row_seconds=1.5, start_seconds=10)
    assert status == "failed" and note.startswith("failed: b hangs, d dies, e breaks, g lost")
    found = {row["name"]: row.get("error", "") for row in read()["parts"]["kernels"]["rows"]}
    assert found == {
        **dict.fromkeys(["a good", "c good", "f good", "h good"], ""),
        "b hangs": "took too long",
        "d dies": "killed by signal 11",
        "e breaks": "RuntimeError: illegal memory access",
        "g lost": "its row was lost",
    }
    text = report.as_markdown([read()])
    assert "- b hangs: **took too long**" in text and "| good | 1,000.0 |" in text
    # Out of time as a whole: what was not reached is named, and no row is blamed.
    status, note = parts.run_rows(made, "bench", ["a good", "b hangs", "c good"], 2.5, row_seconds=30)
    assert (status, note) == ("timeout", "no time for: b hangs, c good")
    # A program that never begins a row is not started for ever.
    program.write_text("import sys; sys.exit('no torch')", "utf-8")
    assert parts.run_rows(made, "bench", ["a good"], 30) == ("failed", "exit code 1; no row came; no torch")


TESTS = """
import time, pytest
pytestmark = pytest.mark.cuda
def test_good(record_property): record_property("syncs", 0)
def test_other(): pass
def test_bad(): assert 1 == 2, "planted"
@pytest.mark.skip(reason="no card")
def test_skipped(): pass
"""


def test_tests_are_rows_also_when_a_file_cannot_be_imported_or_one_dies(recorded, monkeypatch, tmp_path):
    made, read = recorded
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    cuda: x\n", "utf-8")
    (folder / "test_a.py").write_text(TESTS, "utf-8")
    (folder / "test_b.py").write_text("import a_package_that_is_not_there", "utf-8")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    made.num_workers = 2
    status, note = parts.part_tests(made, 60, [str(folder)])
    assert status == "failed" and note.startswith("1 error; 1 failed; 2 passed; 1 skipped")
    found = {row["test"].rpartition("/")[2]: row for row in read()["parts"]["tests"]["rows"]}
    assert set(found) == {"test_b.py", "test_a.py::test_bad", "test_a.py::test_good"}
    assert "No module named" in found["test_b.py"]["message"] and found["test_a.py::test_good"]["syncs"] == 0
    assert found["test_a.py::test_bad"]["message"] == "AssertionError: planted"
    dies = "import os, pytest\n@pytest.mark.cuda\ndef test_dies(): os.kill(os.getpid(), 9)"
    (folder / "test_b.py").write_text(dies, "utf-8")
    made.num_workers = 0
    status, note = parts.part_tests(made, 60, [str(folder)])
    assert (
        status == "failed"
        and note.startswith("1 failed; 2 passed; 1 skipped")
        and "killed by signal 9" in note
    )


def test_a_cut_off_record_is_a_report(recorded):
    """Killed in the middle of a row: the rows before it count, and the next run begins a line of its own."""
    made, read = recorded
    made.recorder.write("begin", part="limits")
    made.recorder.write("row", part="limits", name="copy", gb_per_s=4300.0)
    path = made.recorder._path
    with path.open("a") as file:
        file.write('{"kind": "row", "part": "lim')
    run = read()
    assert run["unreadable"] == 1 and run["parts"]["limits"]["rows"] == [{"name": "copy", "gb_per_s": 4300.0}]
    assert run["parts"]["limits"]["status"] == "cut off" and run["parts"]["bench"]["status"] == "not reached"
    text = report.as_markdown([run])
    assert (
        "| limits | cut off |" in text and "4300.0" in text and "1 lines of the record cannot be read" in text
    )
    again = report.Recorder(path)
    again.write(
        "run", device="card", dry_run=False, started="2026-01-02", commit="c", machine={}, parts=["limits"]
    )
    first, second = report.read_runs([path])
    assert (first["unreadable"], second["unreadable"]) == (1, 0)
    # The later run did not reach its part: that of the earlier one stays in the report.
    assert "| limits | cut off |" in report.as_markdown([first, second])
    assert all(json.loads(line) for line in path.read_text().splitlines() if not line.endswith('"lim'))


def test_a_file_without_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("no\n{}\n", "utf-8")
    for name, words in {
        "a.jsonl": "no run of a GPU check is in it (2 lines",
        "b.jsonl": "cannot be read",
    }.items():
        assert check.main(["--report", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_a_failed_build_spares_the_time_of_the_rest(monkeypatch, tmp_path):
    for name in parts.PARTS:
        monkeypatch.setitem(parts.PARTS, name, lambda check, seconds: ("passed", ""))
    monkeypatch.setitem(parts.PARTS, "build", lambda check, seconds: ("failed", "no nvcc"))
    monkeypatch.setattr(check, "describe", lambda device, folder: {"gpu": "card"})
    assert check.main(["--part", "1", "--out", str(tmp_path)]) == 1
    (run,) = report.read_runs([tmp_path / "report.jsonl"])
    status = {name: part["status"] for name, part in run["parts"].items()}
    assert status == dict.fromkeys(check.RUNS[1], "skipped") | {"build": "failed", "limits": "passed"}
    assert (tmp_path / "card.json").is_file()


def test_rows_of_other_ops_are_kept_when_a_rival_fails():
    """A rival that raises or is wrong costs that rival: the row names it."""
    from benchmarks.common.harness import Case, measure

    def check_result(name, value):
        if value != 1:
            raise ValueError(f"{name} computes something else")

    rivals = {"raises": lambda: 1 / 0, "wrong": lambda: 2, "good": lambda: 1}
    case = Case("op", "s", "cpu", lambda: 1, rivals, check_result, limit=lambda: 1, rounds=3)
    row = measure(case, is_strict=False)
    assert set(row["ratios"]) == {"good"} and row["rival_errors"] == {
        "raises": "ZeroDivisionError: division by zero",
        "wrong": "ValueError: wrong computes something else",
    }
    with pytest.raises(ZeroDivisionError):
        measure(case)
    with pytest.raises(ValueError, match="ours computes something else"):
        measure(Case("op", "s", "cpu", lambda: 3, {}, check_result), is_strict=False)


def test_goals_are_judged_and_shown():
    """What the loss is to reach, whether it does, and rivals that are not there are in the report's table."""
    from benchmarks.common.harness import Case, _goals
    from benchmarks.ops.bench_multistream_loss import GOALS, SHAPES

    assert GOALS == {"1p7b_8k": {"seconds": 0.0105, "peak_bytes": 2**30}} and set(GOALS) <= set(SHAPES)
    row = {"op": "op", "shape": "s", "seconds": 0.0112, "peak_bytes": 2**30}
    case = Case("op", "s", "cuda", lambda: 1, {}, lambda name, value: None, goals=GOALS["1p7b_8k"])
    row |= {"rivals_skipped": ["quack_per_stream: quack-kernels is not installed"], **_goals(case, row)}
    assert [goal["is_met"] for goal in row["goals"].values()] == [False, True]
    assert (
        _goals(Case("op", "s", "cpu", lambda: 1, {}, lambda name, value: None, goals=case.goals), row) == {}
    )
    (line,) = [line for line in report._op_tables([row]) if line.startswith("| s |")]
    assert "| 11,200.0 (goal 10,500: **missed**) |" in line and "| 1,024 (goal 1,024: met) |" in line
    assert "quack-kernels is not installed" in line


def test_a_row_makes_no_more_rounds_than_it_has_time_for():
    from benchmarks.common.harness import FEWEST_ROUNDS, Case, measure

    case = Case("op", "s", "cpu", lambda: time.sleep(0.02), {}, lambda name, value: None, rounds=1000)
    assert FEWEST_ROUNDS <= measure(case, seconds=0.3)["rounds"] < 30
