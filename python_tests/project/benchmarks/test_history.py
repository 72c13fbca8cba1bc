"""Tracking of speed: the comparison of two results files, the history page, and a dry run of the GPU check."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import compare, report, rows
from benchmarks.gpu_check import __main__ as check

ROOT = Path(__file__).resolve().parents[2]


def results(path: Path, commit: str, date: str, **ratios: float) -> Path:
    """A results file as pytest-benchmark writes it, with one row."""
    info = {
        "op": "delay_pack",
        "shape": "smoke",
        "device": "cpu",
        "ratios": ratios,
        "limit_fraction": 0.5,
        "spread": 0.01,
    }
    benchmark = {"name": "x", "stats": {"min": 1e-4}, "extra_info": info}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"benchmarks": [benchmark], "commit_info": {"id": commit}, "datetime": date}), "utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("before", "after", "says", "code"),
    [
        ({"loop": 8.0, "reference": 4.0}, {"loop": 7.8, "reference": 3.9}, "same", 0),
        ({"loop": 8.0, "reference": 4.0}, {"loop": 6.0, "reference": 3.0}, "slower", 1),
        ({"loop": 8.0, "reference": 4.0}, {"loop": 6.0, "reference": 4.0}, "same", 0),
        ({"loop": 8.0}, {"loop": 10.0}, "faster", 0),
        ({"loop": 8.0}, {"other": 1.0}, "unknown", 0),
    ],
)
def test_compare_uses_ratios(tmp_path, capsys, before, after, says, code):
    old = results(tmp_path / "old.json", "a" * 40, "2026-01-01", **before)
    new = results(tmp_path / "new.json", "b" * 40, "2026-01-02", **after)
    assert compare.main([str(old), str(new)]) == code
    assert f"  {says:8} delay_pack smoke cpu" in capsys.readouterr().out


def test_features_are_judged_against_phones(tmp_path, capsys):
    """The script's numbers on features whose nearest centroid is clear: as good as scikit-learn's, and exact."""
    pytest.importorskip("sklearn")
    from benchmarks.studies import kmeans_features

    rng = np.random.default_rng(0)
    phones = rng.integers(-1, 5, 3000)
    centres = rng.normal(0, 20, (6, 4))
    np.save(tmp_path / "x.npy", (centres[phones] + rng.normal(0, 1, (3000, 4))).astype(np.float32))
    np.save(tmp_path / "x_phones.npy", phones)
    words = [
        "--features",
        str(tmp_path),
        "--clusters",
        "6",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    threads = torch.get_num_threads()
    try:
        assert kmeans_features.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| x | 3,000 | 4 | 6 | 1.0000 |" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert found["pnmi"] == found["sklearn_pnmi"] == pytest.approx(1)
    assert found["sklearn_agreement"] == found["float64_agreement"] == 1
    assert found["inertia_ratio"] == pytest.approx(1, abs=1e-6) and 0 <= found["reranked_share"] <= 1


def test_noise_widens_the_band(tmp_path):
    old = rows.Row("op", "s", "cpu", 1.0, {"loop": 8.0}, spread=0.05)
    new = rows.Row("op", "s", "cpu", 1.0, {"loop": 6.0}, spread=0.05)
    assert compare.verdict_of(old, new, 0.05)[0] == "same"
    assert (
        compare.verdict_of(old, rows.Row("op", "s", "cpu", 1.0, {"loop": 5.0}, spread=0.05), 0.05)[0]
        == "slower"
    )


def test_unusable_files_are_named(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text("{}", "utf-8")
    assert compare.main([str(bad), str(bad)]) == 2
    assert "neither pytest-benchmark's JSON nor a report of make gpu-check" in capsys.readouterr().err


def test_history_page_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    results(tmp_path / "results" / "1.json", "a" * 40, "2026-01-01", loop=2.0)
    results(tmp_path / "results" / "2.json", "b" * 40, "2026-01-02", loop=3.0)
    assert report.main() == 0
    table = (tmp_path / "out" / "table.md").read_text("utf-8")
    assert "| delay_pack | smoke | cpu | 100.0 us | 50% | loop 3 | bbbbbbbbbbbb |" in table
    assert "2.0" not in table
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "delay_pack on cpu" in page and "data:image/svg" in page


def run_here(command: list[str], seconds: float) -> tuple[int, str]:
    """``python -m MODULE …`` in this process, which has imported torch and transformers."""
    module, *words = command[command.index("-m") + 1 :]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *words])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0, printed.getvalue()


def test_gpu_check_dry_run(tmp_path, monkeypatch):
    """Every part on tiny shapes, and a report that has them all."""
    in_new_process = check.run

    def run(command, seconds, env=None):
        if {"benchmarks.train.step", "benchmarks.generation.decode"} & set(command):
            return run_here(command, seconds)
        return in_new_process(command, seconds, env)

    monkeypatch.setattr(check, "run", run)
    # The pytest runs inside must not take themselves for workers of this one.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text("utf-8"))
    status = {name: part["status"] for name, part in data["parts"].items()}
    assert status == {
        "build": "skipped",
        "tests": "passed",
        "limits": "passed",
        "bench": "passed",
        "train": "passed",
        "decode": "passed",
        "sanitizer": "skipped",
    }
    assert data["parts"]["limits"]["data"]["copy_gb_per_s"] > 0
    bench = data["parts"]["bench"]["data"]["rows"]
    assert {row["op"] for row in bench} == {
        p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks/ops").glob("bench_*.py")
    }
    assert all(row["ratios"] and row["limit_fraction"] > 0 for row in bench)
    text = path.with_suffix(".md").read_text("utf-8")
    assert "| decode | passed |" in text and "**delay_pack**" in text and len(text.splitlines()) < 80
    assert rows.read(path).rows[0].op == "delay_pack"


def test_a_failing_part_hides_no_other(tmp_path, monkeypatch):
    def broken(device, seconds):
        raise RuntimeError("planted")

    monkeypatch.setitem(check.PARTS, "limits", broken)
    slow = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"]
    monkeypatch.setitem(check.PARTS, "train", lambda d, s: check._failed(*check.run(slow, 1.5)))
    monkeypatch.setitem(
        check.PARTS, "decode", lambda d, s: check.Result("passed", data={"step_ms_best": 1.0})
    )
    code = check.main(["--device", "cpu", "--parts", "decode", "limits", "train", "--out", str(tmp_path)])
    assert code == 1
    (path,) = tmp_path.glob("*.json")
    parts = json.loads(path.read_text("utf-8"))["parts"]
    assert {n: p["status"] for n, p in parts.items()} == {
        "limits": "failed",
        "train": "timeout",
        "decode": "passed",
    }
    assert "planted" in parts["limits"]["note"] and parts["train"]["note"] == "began"


def test_a_benchmark_that_fails_hides_no_other(monkeypatch):
    """On a GPU each file has a process of its own: rows of the others are kept, and the failed ones are named."""
    seen = []

    def run(command, seconds):
        stem = Path(command[3]).stem
        seen.append((stem, seconds))
        if stem == "bench_kmeans_assign":
            return None, "still running"
        if stem == "bench_multistream_loss":
            return 1, "E  wrong result"
        row = {"name": stem, "stats": {"min": 1e-3}, "extra_info": {"op": stem.removeprefix("bench_")}}
        Path(command[-3].partition("=")[2]).write_text(json.dumps({"benchmarks": [row]}), "utf-8")
        return 0, ""

    monkeypatch.setattr(check, "run", run)
    result = check.part_bench("cuda", 100.0)
    stems = sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py"))
    assert [stem for stem, _ in seen] == stems
    assert seen[0][1] == pytest.approx(100 / len(stems), abs=1) and seen[-1][1] == pytest.approx(100, abs=1)
    assert result.status == "failed"
    assert result.note == "bench_kmeans_assign: out of time; bench_multistream_loss: E  wrong result"
    done = [
        s.removeprefix("bench_") for s in stems if s not in ("bench_kmeans_assign", "bench_multistream_loss")
    ]
    assert [row["op"] for row in result.data["rows"]] == done
