"""bench-compare: another commit's benchmarks beside the working tree's, by turns, in a small repository."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.common import compare_commits
from benchmarks.common.compare_commits import judge, main

BENCH = """
import os, time, pytest
assert os.environ["SPEECHLM_BENCH_RIVALS"] == "none"
@pytest.mark.parametrize("shape", {shapes})
def test_bench(benchmark, shape):
    benchmark.pedantic(lambda: time.sleep({seconds}), rounds=3)
    benchmark.extra_info.update(op="nap", shape=shape, device="cpu")
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose one op sleeps; gives a function that changes and commits it."""
    for name in list(compare_commits.os.environ):
        if name.startswith("PYTEST_"):
            monkeypatch.delenv(name)
    root = tmp_path / "repository"
    (root / "benchmarks" / "ops").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".gitignore").write_text("build/\n", "utf-8")

    def change(seconds, shapes=("small",), is_commit=True):
        text = BENCH.format(seconds=seconds, shapes=list(shapes))
        (root / "benchmarks" / "ops" / "bench_nap.py").write_text(text, "utf-8")
        if is_commit:
            name = ["-c", "user.name=t", "-c", "user.email=t@t"]
            subprocess.run(["git", "-C", str(root), "add", "-A"], check=True)
            subprocess.run(["git", "-C", str(root), *name, "commit", "-qm", "x"], check=True)
        return root

    return change


def test_a_slower_tree_is_found_and_nothing_is_left_behind(repository, capsys):
    repository(0.01, ["small", "old"])
    root = repository(0.03, ["small", "new"], is_commit=False)
    assert main(["HEAD", "--rounds", "1"], root) == 1
    out = capsys.readouterr().out
    assert "  slower   nap small cpu: 0.3" in out and "new      nap new" in out and "gone     nap old" in out
    listed = subprocess.run(
        ["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True
    ).stdout
    assert len(listed.splitlines()) == 1 and not list((root / "build" / "bench-compare").glob("*/"))


def test_what_cannot_be_compared_is_said(repository, capsys):
    root = repository(0.001)
    assert main(["no-such-commit"], root) == 2
    assert "git rev-parse" in capsys.readouterr().err
    assert main(["HEAD", "--op", "other"], root) == 2
    assert "has no benchmark bench_other.py" in capsys.readouterr().err
    (root / "benchmarks" / "ops" / "bench_nap.py").write_text(
        "def test_bench(benchmark): assert 0, 'planted'", "utf-8"
    )
    assert main(["HEAD", "--rounds", "1"], root) == 2
    assert "the benchmarks of repository fail" in (error := capsys.readouterr().err) and "planted" in error


@pytest.mark.parametrize(
    ("base", "tree", "verdict", "ratio", "noise"),
    [
        ([1.0, 1.01], [1.0, 1.0], "same", 1.0, 0.01),
        ([1.0, 1.0], [1.2, 1.25], "slower", 0.833, 0.042),
        ([1.0, 1.4], [1.2, 1.2], "same", 0.833, 0.4),
        ([1.0, 1.0], [0.8, 0.8], "faster", 1.25, 0.0),
        ([1.0, 1.0], [1.04, 1.04], "same", 0.962, 0.0),
    ],
)
def test_a_change_counts_beyond_the_noise_of_both(base, tree, verdict, ratio, noise):
    found = judge(base, tree, 0.05)
    assert found[0] == verdict and found[1:] == pytest.approx((ratio, noise), abs=1e-3)
