"""Runs in an environment of `check.py`, not in the suite: the wheel is what is imported, beside the torch asked for."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import speechlm_ext
from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

VENV = Path(os.environ["WHEEL_CHECK_VENV"])


def test_the_wheel_is_imported():
    for file in (speechlm_ext.__file__, native.__file__, torch.__file__):
        assert VENV / "lib" in Path(file).parents and "site-packages" in Path(file).parts, file


def test_beside_the_torch_asked_for():
    assert torch.__version__.partition("+")[0] == os.environ["WHEEL_CHECK_TORCH"]
    assert VENV in Path(OPENMP_RUNTIME).parents, "the kernels do not share torch's OpenMP runtime"


def test_versions_agree():
    info = native.build_info()
    assert info["version"] == speechlm_ext.__version__
    # Wheels for PyPI have no local version.
    assert version("speechlm_ext") in (
        speechlm_ext.__version__,
        f"{speechlm_ext.__version__}+{info['variant']}",
    )


def test_commands():
    doctor = subprocess.run(
        [VENV / "bin" / "speechlm", "doctor", "--json", "true"], capture_output=True, text=True, check=True
    )
    report = json.loads(doctor.stdout)
    assert report["versions"]["torch"] == version("torch") and report["native"]["file"] == native.__file__
    shown = subprocess.run(
        [VENV / "bin" / "speechlm", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["speechlm_ext", speechlm_ext.__version__]
