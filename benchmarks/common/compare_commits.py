"""Speed of the working tree beside another commit's, or beside a results file: ``make bench-compare BASE=...``.

    python -m benchmarks.common.compare_commits BASE [--op delay_pack] [--rounds 2] [--band 0.05] [-k EXPRESSION]

With a commit, that commit is checked out and built beside the working tree, and both run their own benchmarks by turns,
base, tree, base, tree: a machine that changes its speed does so for both. A row's ratio is the base's best time divided
by the tree's, its noise how far the runs of each lie apart. A row is slower if its ratio is below 1 by more than the
noise and the band. Rivals are left out. With a file, the tree runs once, with rivals, and the ratios to them are
compared (:mod:`.compare`). The exit code is 1 if a row is slower, 2 if nothing can be compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import compare
from benchmarks.common.rows import ResultsError, read
from benchmarks.common.sources import digest_of_sources
from speechlm_ext.utils.console import make_output_safe

ROOT = Path(__file__).resolve().parents[2]
Times = dict[tuple[str, str, str], list[float]]


class CompareError(Exception):
    """A base that cannot be had, or a benchmark that fails."""


def git(root: Path, *words: str) -> str:
    """Output of a git command.

    Raises:
        CompareError: it fails.
    """
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise CompareError(f"git {words[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


@contextmanager
def checked_out(root: Path, base: str) -> Iterator[Path]:
    """A commit in a worktree of its own, built, and removed at the end."""
    commit = git(root, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    tree = root / "build" / "bench-compare" / commit[:12]
    if tree.exists():  # left by a run that was killed
        git(root, "worktree", "remove", "--force", str(tree))
    git(root, "worktree", "add", "--detach", str(tree), commit)
    try:
        build(root, tree)
        yield tree
    finally:
        git(root, "worktree", "remove", "--force", str(tree))


def build(root: Path, tree: Path) -> None:
    """The native module of ``tree``: compiled, or that of ``root`` if its sources are the same."""
    modules = list((root / "speechlm_ext").glob("_C*.so"))
    if modules and digest_of_sources(root, "") == digest_of_sources(tree, ""):
        for module in modules:
            shutil.copy2(module, tree / "speechlm_ext")
        return
    if not (tree / "setup.py").is_file():
        return
    print(f"building {tree.name}", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=tree).returncode:
        raise CompareError(f"{tree.name} cannot be built; see above.")


def run_benchmarks(tree: Path, out: Path, op: str, expression: str, env: Mapping[str, str]) -> None:
    """Run a tree's own benchmarks of an op, or of all (""), into pytest-benchmark's JSON.

    Raises:
        CompareError: they fail, or there are none.
    """
    files = sorted(map(str, (tree / "benchmarks").rglob(f"bench_{op or '*'}.py")))
    if not files:
        raise CompareError(f"{tree.name} has no benchmark bench_{op or '*'}.py.")
    command = [sys.executable, "-m", "pytest", *files, "-o", "python_files=bench_*.py", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-only", f"--benchmark-json={out}"]
    command += ["-k", expression] if expression else []
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    if done.returncode:
        raise CompareError(f"the benchmarks of {tree.name} fail:\n{(done.stdout + done.stderr)[-3000:]}")


def judge(base: list[float], tree: list[float], band: float) -> tuple[str, float, float]:
    """``("slower" | "faster" | "same", ratio, noise)`` from the seconds of the runs of both."""
    ratio = min(base) / min(tree)
    noise = max(max(times) / min(times) - 1 for times in (base, tree))
    least = max(band, noise)
    return ("slower" if ratio < 1 - least else "faster" if ratio > 1 + least else "same"), ratio, noise


def with_commit(root: Path, base: str, op: str, expression: str, rounds: int, band: float) -> int:
    """Compare ``root`` with a commit; prints a line per row and returns the exit code."""
    times: tuple[Times, Times] = {}, {}
    results = root / "build" / "bench-compare" / "rows.json"
    with checked_out(root, base) as other:
        for number in range(2 * rounds):
            which = number % 2
            run_benchmarks((other, root)[which], results, op, expression, {"SPEECHLM_BENCH_RIVALS": "none"})
            for row in read(results).rows:
                times[which].setdefault(row.key, []).append(row.seconds)
            print(f"run {number + 1} of {2 * rounds}: {('base', 'tree')[which]}", flush=True)
    slower = 0
    print("base time ÷ tree time, and the noise of both:")
    for key, seconds in sorted(times[1].items()):
        name = " ".join(key)
        if key not in times[0]:
            print(f"  new      {name}: {min(seconds) * 1e6:,.1f} us")
            continue
        verdict, ratio, noise = judge(times[0][key], seconds, band)
        slower += verdict == "slower"
        print(f"  {verdict:8} {name}: {ratio:.3f} ± {noise:.3f} ({min(seconds) * 1e6:,.1f} us)")
    for key in sorted(set(times[0]) - set(times[1])):
        print(f"  gone     {' '.join(key)}")
    if not set(times[0]) & set(times[1]):
        raise CompareError("the two have no row in common.")
    print(f"{slower} slower" if slower else "nothing became slower")
    return 1 if slower else 0


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Compare with what the command line names."""
    parser = argparse.ArgumentParser(prog="bench-compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="a commit, or a file of results")
    parser.add_argument("--op", default="", help="this op alone")
    parser.add_argument("-k", dest="expression", default="", help="as pytest's: which rows, e.g. smoke")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each commit (2)")
    parser.add_argument("--band", type=float, default=0.05, help="minimum change that counts (0.05)")
    arguments = parser.parse_args(argv)
    try:
        if not Path(arguments.base).is_file():
            return with_commit(
                root, arguments.base, arguments.op, arguments.expression, arguments.rounds, arguments.band
            )
        results = root / "build" / "bench-compare" / "rows.json"
        results.parent.mkdir(parents=True, exist_ok=True)
        run_benchmarks(root, results, arguments.op, arguments.expression, {})
        return compare.main([arguments.base, str(results), "--band", str(arguments.band)])
    except (CompareError, ResultsError) as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
