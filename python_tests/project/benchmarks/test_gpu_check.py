"""The check of a GPU, dry: every part's real code on tiny shapes, without the packages that a GPU machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import rows as results
from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import build, parts, report, rows
from python_tests.project.benchmarks.bare_machine import bare_environment, hidden

ROOT = Path(__file__).resolve().parents[3]


def test_the_bare_machine_is_bare(tmp_path):
    assert {"soundfile", "soxr", "jsonargparse", "deepspeed"} <= hidden()[0]
    assert not {"torch", "transformers", "numpy", "pytest", "speechlm_ext"} & hidden()[0]
    ask = "import importlib.util as u; print([u.find_spec(n) is None for n in ('soundfile', 'deepspeed', 'numpy')])"
    env = bare_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True, False]"


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[int, tuple[int, str, Path]]:
    """Exit code, output and folder of the two runs, which run side by side."""
    site, started = tmp_path_factory.mktemp("site"), {}
    for part in (1, 2):
        out = tmp_path_factory.mktemp(f"run{part}")
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--shapes", "tiny"]
        started[part] = (
            out,
            subprocess.Popen(
                [*command, "--part", str(part), "--out", str(out)],
                cwd=ROOT,
                env={**bare_environment(site), "SPEECHLM_GIT_COMMIT": "c" * 40},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ),
        )
    return {
        part: ((done := process.communicate(timeout=600)[0]) and process.returncode, done, out)
        for part, (out, process) in started.items()
    }


def test_every_part_runs(both):
    runs = []
    for code, printed, out in both.values():
        assert code == 0, printed
        (run,) = report.read_runs([out / "report.jsonl"])
        assert run["commit"] == "c" * 40 and run["dry_run"] and run["unreadable"] == 0
        runs.append(run)
    first, second = ({name: part["status"] for name, part in run["parts"].items()} for run in runs)
    assert first == {
        "build": "skipped", "limits": "passed", "kernels": "passed", "decode": "passed", "tests": "skipped"
    }  # fmt: skip
    assert second == {"build": "skipped", "sanitizer": "skipped", "train": "passed", "bench": "passed"}
    found = {name: part["rows"] for run in runs for name, part in run["parts"].items()}
    assert found["limits"][0]["gb_per_s"] > 0 and found["train"][0]["positions_per_s"] > 0
    assert [row["name"] for row in found["kernels"]] == rows.names(rows.FIRST_ROWS, True)
    assert [row["name"] for row in found["bench"]] == rows.names(rows.OTHER_ROWS, True)
    for row in found["kernels"] + found["bench"]:
        assert (
            row["ratios"] and row["limit_fraction"] > 0 and row["seconds"] > 0 and "rival_errors" not in row
        )
        assert not any(name.endswith("compiled") for name in row["ratios"])
    assert {row["batch"] for row in found["decode"]} == {1, 2}
    assert [row["op"] for row in found["sanitizer"]][-1] == "delay_pack" and len(found["sanitizer"]) == 6
    # All tests that need CUDA are there: no file of them needs a package that is hidden.
    note = runs[0]["parts"]["tests"]["note"]
    files = parts.cuda_tests()
    assert int(note.split()[0]) > 500 and "skipped" in note and "error" not in note
    assert {"python_tests/ops/test_syncs.py", "python_tests/generation/engine/test_slots.py"} <= set(files)


def test_the_two_reports_make_one(both, tmp_path, capsys):
    records = [str(out / "report.jsonl") for _, _, out in both.values()]
    assert check.main(["--report", *records, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in check.PARTS:
        assert f"| {part} | " in text
    assert "**delay_pack**" in text and f"Commit {'c' * 40}" in text and "(dry run)" in text
    (path,) = tmp_path.glob("*.json")
    found = results.read(path)
    every = rows.names(rows.FIRST_ROWS, True) + rows.names(rows.OTHER_ROWS, True)
    assert len(found.rows) == len(set(every)) and found.commit == "c" * 40
    assert (both[1][2] / "report.md").read_text("utf-8").startswith("# ")
    assert "==== kernels" in (both[1][2] / "log.txt").read_text("utf-8", errors="replace")


def test_every_named_row_exists():
    """The shapes and options of the rows are those of the benchmarks."""
    from benchmarks.gpu_check.kernels import MAKERS
    from benchmarks.ops import bench_multistream_embed, bench_multistream_sample

    options = {
        "multistream_embed": bench_multistream_embed.PASSES,
        "multistream_sample": bench_multistream_sample.MODES,
    }
    for op, shape, *words in (*rows.FIRST_ROWS, *rows.OTHER_ROWS):
        assert shape in sys.modules[MAKERS[op].__module__].SHAPES, (op, shape)
        assert len(words) == (op in options) and all(word in options[op] for word in words)
    assert len(set(rows.FIRST_ROWS + rows.OTHER_ROWS)) == len(rows.FIRST_ROWS) + len(rows.OTHER_ROWS)


def test_clocks_stay_out_of_captured_steps(monkeypatch):
    """On a GPU an event that is recorded while a graph is captured is an error: the steps that are timed whole have
    graphs and no clock inside, and the clock's own run has no graphs."""
    import time

    import torch

    from benchmarks.generation import decode
    from benchmarks.generation.models import build as build_model

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    watched, engine, made = decode.watched, decode.Engine, []

    def watch_engine(of, clock):
        assert of._graphs is None, "a clock looks into captured steps"
        return watched(of, clock)

    def on_gpu(model, num_slots, cuda_graphs=None):
        made.append(engine(model, num_slots, cuda_graphs=cuda_graphs is not False))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(decode, "watched", watch_engine)
    monkeypatch.setattr(decode, "Engine", on_gpu)
    row = decode.measure_batch(build_model("smoke", "cpu"), 2, 6, "cuda")
    assert [e._graphs is None for e in made] == [False, True]
    assert 0 < row["outside"] < 1 and row["step_ms"] > 0 and row["frames_per_s"] > 0


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "describe", lambda device, folder: {"missing": "no CUDA device"})
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device; --device cpu is a dry run" in capsys.readouterr().err


def test_both_runs_fit_into_their_time():
    for names in check.RUNS.values():
        assert set(names) <= set(check.SECONDS) and check.RUN_SECONDS <= 265
    assert [name for run in check.RUNS.values() for name in run if name != "build"] == [
        name for name in check.PARTS if name != "build"
    ]


def test_the_build_needs_no_pyproject(tmp_path, monkeypatch):
    """setup.py's command alone: an older setuptools refuses the licence's form in pyproject.toml."""
    (tmp_path / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    (tmp_path / "pyproject.toml").write_text("[project]\nlicense = 3\n", "utf-8")
    (tmp_path / "speechlm_ext").mkdir()
    (tmp_path / "speechlm_ext" / "__init__.py").write_text('__version__ = "1.2.3"\n', "utf-8")
    commands = []

    def run(command, **options):
        commands.append(command)
        if "--build" in command:
            (lib := Path(command[command.index("--build") + 1]) / "lib").mkdir()
            (lib / f"_C{build.sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"built")
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("SPEECHLM_CUDA_PTX", "OFF")
    build.compile_module(tmp_path)
    (module,) = (tmp_path / "speechlm_ext").glob("_C*.so")
    assert module.read_bytes() == b"built" and "-DSPEECHLM_CUDA_PTX=OFF" in commands[-2]


def test_the_build_is_made_once(tmp_path, monkeypatch):
    """The same sources, card and module: nothing is compiled. Another module or another source: it is."""
    import torch

    (tmp_path / "speechlm_ext").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("a", "utf-8")
    module = tmp_path / "speechlm_ext" / f"_C{build.sysconfig.get_config_var('EXT_SUFFIX')}"
    calls, found = [], []
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(
        build, "compile_module", lambda root: (calls.append(root), module.write_bytes(b"built"))
    )
    monkeypatch.setattr(build, "emit", found.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("SPEECHLM_CUDA", "SPEECHLM_CUDA_ARCHS", "SPEECHLM_CUDA_PTX"):
        monkeypatch.setenv(name, "")
    for change in (lambda: None, lambda: None, lambda: module.write_bytes(b"other"), lambda: None,
                   lambda: (tmp_path / "csrc" / "a.cu").write_text("b", "utf-8")):  # fmt: skip
        change()
        build.main()
    assert [row["was_there"] for row in found if "was_there" in row] == [False, True, False, True, False]
    assert len(calls) == 3 and found[0]["arch"] == "sm_90a" and json.dumps(found)
