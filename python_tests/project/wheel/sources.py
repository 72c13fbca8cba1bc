"""The source distribution, and the files that git knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.project.wheel.build import remove_leftovers

ROOT = Path(__file__).resolve().parents[3]


def tracked(*folders: str) -> set[str]:
    """Files that git knows below the folders."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return {name for name in listed.stdout.split() if (ROOT / name).is_file()}


def make_sdist(folder: Path) -> Path:
    """Make the source distribution of the tree in ``folder``."""
    remove_leftovers()  # a file listed there would be packed whatever MANIFEST.in says
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    made = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    (path,) = folder.glob("*.tar.gz")
    return path
