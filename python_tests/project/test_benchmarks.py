"""What keeps track of speed: the judge of two results files, the history page, and a dry run of the GPU check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import compare, report, rows

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
def test_compare_judges_ratios(tmp_path, capsys, before, after, says, code):
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
    assert compare.judge(old, new, 0.05)[0] == "same"
    assert (
        compare.judge(old, rows.Row("op", "s", "cpu", 1.0, {"loop": 5.0}, spread=0.05), 0.05)[0] == "slower"
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


def test_gpu_check_dry_run(tmp_path):
    """Every part on tiny shapes, and a report that has them all."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    # The pytest runs inside must not think that they are workers of this one.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
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
    from benchmarks.gpu_check import __main__ as check

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
