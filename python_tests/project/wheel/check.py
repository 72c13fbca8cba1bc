"""``make wheel-check``: does a wheel work beside the torch versions that the package supports?

``python -m python_tests.project.wheel.check [WHEEL] --torch 2.6.0 2.13.0 [--require 2.6.0]``. For each version of torch
a fresh virtual environment gets the wheel, that torch, DeepSpeed and what the tests need. There, on a copy of the tests
without the sources, run: the places of the imported modules (``installed.py``); the values of every op against its
reference, with torch.compile and export; and the command line from recordings to scores, with training and generation.

A torch that cannot be had is reported as skipped, with pip's reason. The exit code is 1 if a check failed, if none ran,
or if a required version was skipped. ``PIP_EXTRA_INDEX_URL`` with torch's CPU builds saves gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from python_tests.project.wheel.build import WheelError, build_wheel

ROOT = Path(__file__).resolve().parents[3]
#: What the tests need, besides the wheel's own requirements and the ``train`` extra.
NEEDS = ("pytest", "pytest-benchmark", "hypothesis", "filelock", "jiwer", "num2words", "langcodes>=3.5")
TESTS = (
    "python_tests/project/wheel/installed.py",
    "python_tests/ops/delay_pack/test_delay_pack.py",
    "python_tests/ops/delay_pack/test_torch.py",
    "python_tests/ops/kmeans_assign/test_kmeans_assign.py",
    "python_tests/ops/multistream_embed/test_multistream_embed.py",
    "python_tests/ops/multistream_loss/test_multistream_loss.py",
    "python_tests/ops/multistream_loss/test_row_kernel.py",
    "python_tests/ops/multistream_sample/test_exact.py",
    "python_tests/ops/scatter_sum/test_scatter_sum.py",
    "python_tests/project/test_pipeline.py",
)


@dataclass(frozen=True)
class Outcome:
    """What became of the check beside one torch."""

    torch: str
    verdict: str
    """``passed``, ``failed`` or ``skipped``."""
    words: str
    """pytest's summary, or the reason."""
    install_seconds: float = 0.0
    test_seconds: float = 0.0

    def __str__(self) -> str:
        times = (
            f" (install {self.install_seconds:.0f} s, tests {self.test_seconds:.0f} s)"
            if self.test_seconds
            else ""
        )
        return f"torch {self.torch}: {self.verdict}: {self.words}{times}"


def pip_install(venv: Path, *packages: str, seconds: float | None = None) -> str:
    """Install into the environment, in at most ``seconds``; returns pip's error, or "" when all is installed."""
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    try:
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"pip install {' '.join(packages)} took more than {seconds:g} s"
    errors = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE)
    return "" if done.returncode == 0 else (errors[-1] if errors else f"pip: exit {done.returncode}")


def check(wheel: Path, torch: str, keep_output: bool, seconds: float | None = None) -> Outcome:
    """Check the wheel beside one version of torch, in a folder that is removed again: a torch takes up to 5 GB."""
    with tempfile.TemporaryDirectory(prefix=f"wheel-check-{torch}-") as folder:
        work, venv = Path(folder), Path(folder) / "venv"
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        if error := pip_install(venv, f"torch=={torch}", seconds=seconds):
            return Outcome(torch, "skipped", error)
        # torch again: pip then keeps that version, or says which requirement it does not fit.
        if error := pip_install(venv, f"torch=={torch}", f"speechlm_ext[train] @ {wheel.as_uri()}", *NEEDS):
            return Outcome(torch, "failed", f"the wheel cannot be installed beside it: {error}")
        installed = time.monotonic()
        shutil.copytree(
            ROOT / "python_tests", work / "python_tests", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / "pyproject.toml", work)
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPEECHLM_TEST_NATIVE")}
        done = subprocess.run(
            [
                venv / "bin" / "python",
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                *TESTS,
            ],
            cwd=work,
            env=env | {"WHEEL_CHECK_VENV": str(venv), "WHEEL_CHECK_TORCH": torch, "OMP_NUM_THREADS": "1"},
            stdout=None if keep_output else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        end = time.monotonic()
    if done.returncode and not keep_output:
        print(done.stdout[-8000:])
    lines = (done.stdout or "").strip().splitlines()
    words = lines[-1] if lines else f"exit {done.returncode}"
    return Outcome(
        torch, "failed" if done.returncode else "passed", words, installed - start, end - installed
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "wheel", type=Path, nargs="?", help="default: the CPU variant of the sources, built first"
    )
    parser.add_argument("--torch", nargs="+", required=True, help="versions, e.g. 2.6.0 2.13.0")
    parser.add_argument("--require", nargs="*", default=[], help="versions that must not be skipped")
    parser.add_argument(
        "--torch-seconds", type=float, help="maximum time to install a torch; a slower one is skipped"
    )
    parser.add_argument("--show", action="store_true", help="print the tests' output as it comes")
    options = parser.parse_args()
    try:
        wheel = options.wheel.resolve(strict=True) if options.wheel else build_wheel("cpu", ROOT / "dist")
    except (OSError, WheelError) as error:
        print(f"wheel-check: {error}", file=sys.stderr)
        return 1
    outcomes = []
    for torch in dict.fromkeys([*options.torch, *options.require]):
        outcomes.append(check(wheel, torch, options.show, options.torch_seconds))
        print(outcomes[-1], flush=True)
    return verdict(outcomes, options.require)


def verdict(outcomes: list[Outcome], required: list[str]) -> int:
    """The exit code: 1 if a check failed, if none ran, or if a required one was skipped; else 0."""
    failed = [o.torch for o in outcomes if o.verdict == "failed"]
    skipped = [o.torch for o in outcomes if o.verdict == "skipped"]
    missing = [torch for torch in required if torch in skipped]
    if missing:
        print(f"wheel-check: required, but skipped: torch {', '.join(missing)}", file=sys.stderr)
    if len(skipped) == len(outcomes):
        print("wheel-check: no check ran", file=sys.stderr)
    return int(bool(failed or missing or len(skipped) == len(outcomes)))


if __name__ == "__main__":
    sys.exit(main())
