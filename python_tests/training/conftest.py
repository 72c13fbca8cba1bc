"""The runs that the tests of training compare, made once for all test processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from python_tests.training.tiny import make_tokens
from python_tests.utils.processes import torchrun


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all runs of ``runs.py``."""
    pytest.importorskip("deepspeed", reason="training needs deepspeed: pip install 'speechlm_ext[train]'")
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each, side by side.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training-runs"
    with FileLock(f"{root}.lock"):
        if not (root / "done").is_file():
            shutil.rmtree(root, ignore_errors=True)
            make_tokens(root / "tokens")
            torchrun("python_tests.training.drive", root)
            (root / "done").touch()
    return root


@pytest.fixture(scope="session")
def tokens(runs: Path) -> Path:
    """The runs' token folder."""
    return runs / "tokens"
