"""The counts are those of budgets.json and of the page; the simulation counts known calls as a GPU would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from python_tests.cuda_on_cpu.launches import table
from python_tests.cuda_on_cpu.launches.known_calls import COMPARED, KNOWN
from python_tests.cuda_on_cpu.launches.recorder import Counts, Recorder

STORED = json.loads(table.BUDGETS.read_text("utf-8"))
BY_TITLE = {table.title(case): case for case in table.CASES}


def run(module: str, *arguments: str) -> dict[str, Any]:
    """What a module prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=table.PAGE.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run("python_tests.cuda_on_cpu.launches", "--json")


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return run("python_tests.cuda_on_cpu.launches.known_calls")


# ---- the budgets ----------------------------------------------------------------------------------------------------
def test_the_page_has_the_stored_counts() -> None:
    assert set(STORED["cases"]) == set(BY_TITLE), table.UPDATE
    page = table.PAGE.read_text("utf-8")
    assert table.page_table(page) == table.render(STORED), table.UPDATE
    for name, version in STORED["versions"].items():
        assert f"{name} {'.'.join(version.split('.')[:2])}" in page, f"the page names another {name}"


@pytest.mark.parametrize("title", BY_TITLE)
def test_counts_are_the_budget(title: str, measured: dict[str, Any]) -> None:
    found, budget = measured["cases"][title], dict(STORED["cases"][title])
    if measured["versions"] != STORED["versions"]:
        budget["aten"] = found["aten"]  # torch's and transformers' own numbers of ops
    if lines := table.differences(budget, found):
        pytest.fail("\n".join([f"{title} is not as budgeted:", *lines, f"If it is meant, {table.UPDATE}."]))


def test_differences_names_what_rose_and_what_fell() -> None:
    before = {"aten": {"add": 2, "mul": 1}, "own": {}, "syncs": {"nonzero": 1}}
    now = {"aten": {"add": 3}, "own": {"a.cu: kernel": 1}, "syncs": {"nonzero": 1}}
    assert table.differences(before, now) == [
        "aten: add: 2 -> 3",
        "aten: mul: 1 -> 0",
        "own: a.cu: kernel: 0 -> 1",
    ]
    assert table.differences(now, now) == []


def test_a_table_line_needs_linear_counts() -> None:
    assert table._linear([72, 113, 154]) == "31 + 41 L"
    assert table._linear([5, 5, 5]) == "5"
    with pytest.raises(ValueError, match="not linear"):
        table._linear([72, 113, 155])


# ---- the simulation -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KNOWN)
def test_counts_of_known_calls(name: str, known: dict[str, Any]) -> None:
    _, launches, syncs = KNOWN[name]
    assert known["known"][name] == [launches, syncs]


@pytest.mark.parametrize("name", COMPARED)
def test_the_ops_are_those_of_fake_cuda_tensors(name: str, known: dict[str, Any]) -> None:
    ops = known["ops"][name]
    assert len(ops["fake"]) > 0
    assert ops["simulated"] == ops["fake"]


def test_a_training_step_has_the_values_of_the_cpu(known: dict[str, Any]) -> None:
    losses = known["losses"]
    assert losses["simulated"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_refuses_what_a_gpu_refuses(known: dict[str, Any]) -> None:
    assert "all tensors to be on the same device" in known["errors"]["two devices"]
    assert "numpy" in known["errors"]["numpy"]


# ---- on a GPU -------------------------------------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.parametrize("title", BY_TITLE)
def test_a_gpu_counts_the_same(title: str) -> None:
    """The recorder on real tensors, torch's report of syncs, and the profiler's kernels."""
    case, budget, device = BY_TITLE[title], STORED["cases"][title], torch.device("cuda", 0)
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: case.is_capturing):
        with Recorder() as recorder:
            call = case.setup(device)
            recorder.counts = Counts()
            call()
        assert recorder.counts.syncs.total() == sum(budget["syncs"].values())
        if table.versions() == STORED["versions"]:
            assert recorder.counts.aten.total() == sum(budget["aten"].values())

        call = case.setup(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        reported = [w for w in caught if "synchronizing" in str(w.message)]
        assert len(reported) == sum(budget["syncs"].values())

        call = case.setup(device)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    own = [name for name in kernels if "speechlm::" in name]
    assert len(own) == sum(n for name, n in budget["own"].items() if not name.startswith("cub"))
    assert len(kernels) >= sum(budget["aten"].values()) + sum(budget["own"].values())
