"""Tracking of speed: the comparison of two results files, and the history page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import compare, report, rows
from benchmarks.gpu_check.report import add_to_history


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
    assert "neither pytest-benchmark's JSON nor a history of make gpu-check" in capsys.readouterr().err


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


def run_of(started: str, commit: str, device: str, **rows: list[dict[str, object]]) -> dict[str, object]:
    """A run of a GPU check, with rows in some of its parts."""
    parts = {
        name: {"status": "passed", "seconds": 1, "note": "", "rows": found} for name, found in rows.items()
    }
    return {
        "started": started,
        "commit": commit,
        "device": device,
        "dry_run": False,
        "machine": {},
        "parts": parts,
    }


def op_row(shape: str, seconds: float, device: str = "NVIDIA H200") -> dict[str, object]:
    return {"op": "delay_pack", "shape": shape, "device": device, "seconds": seconds, "ratios": {"loop": 2.0}}


def test_the_history_of_a_device_keeps_every_run(tmp_path, monkeypatch, capsys):
    """A second run joins the first, adding one again changes nothing, and the newest commit's rows are complete."""
    card = "NVIDIA H200"
    old = run_of("2026-01-01T00:00:00.0Z", "a" * 40, card, kernels=[op_row("1p7b_8k", 3e-3)])
    first = run_of("2026-01-02T00:00:00.0Z", "b" * 40, card, kernels=[op_row("1p7b_8k", 2e-3)])
    second = run_of(
        "2026-01-02T00:09:00.0Z", "b" * 40, card, bench=[op_row("million", 1e-3), {"name": "x", "error": "e"}]
    )
    results_folder = tmp_path / "results"
    for runs in ([second, first], [old], [first]):
        add_to_history(runs, results_folder)
    path = results_folder / "nvidia-h200.json"
    assert [run["commit"][0] for run in json.loads(path.read_text("utf-8"))["runs"]] == ["a", "b", "b"]
    found = rows.read(path)
    assert {(row.shape, row.seconds) for row in found.rows} == {("1p7b_8k", 2e-3), ("million", 1e-3)}
    assert found.kinds == {card} and len(rows.read_all(path)) == 3
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.main() == 0
    assert f"| delay_pack | 1p7b_8k | {card} | 2,000.0 us |" in (tmp_path / "out" / "table.md").read_text(
        "utf-8"
    )
    path.write_text("[]", "utf-8")
    with pytest.raises(ValueError, match="nvidia-h200.json: not the history of a device"):
        add_to_history([first], results_folder)
    assert path.read_text("utf-8") == "[]"


def test_other_devices_are_refused(tmp_path, capsys):
    card = run_of("2026-01-01T00:00:00.0Z", "a" * 40, "NVIDIA H200", kernels=[op_row("smoke", 1e-3)])
    (history,) = add_to_history([card], tmp_path / "a")
    other = results(tmp_path / "cpu.json", "b" * 40, "2026-01-02", loop=2.0)
    assert compare.main([str(history), str(other)]) == 2
    error = capsys.readouterr().err
    assert (
        "was measured on NVIDIA H200" in error
        and "on unknown processor; the ratios of different devices" in error
    )
    card["parts"]["kernels"]["rows"] = [op_row("smoke", 1e-3, "NVIDIA H100")]
    (third,) = add_to_history([card], tmp_path / "b")
    assert compare.main([str(history), str(third)]) == 2
    assert compare.main([str(history), str(history)]) == 0
