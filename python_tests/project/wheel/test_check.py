"""What a wheel may be called, the files of the source distribution, and the verdicts of ``make wheel-check``."""

from __future__ import annotations

import os
import platform
import sys
import tarfile
from pathlib import Path

import pytest

from python_tests.project.wheel import check
from python_tests.project.wheel.check import Outcome
from python_tests.project.wheel.sources import make_sdist, tracked

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree"),
    pytest.mark.skipif(platform.system() != "Linux", reason="manylinux wheels are for Linux"),
]


def test_a_wheel_is_not_named_after_another_variant(tmp_path):
    from python_tests.project.wheel.test_build import configure

    done = configure(tmp_path, SPEECHLM_CUDA="OFF", SPEECHLM_LOCAL_VERSION="cu130")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "SPEECHLM_LOCAL_VERSION is 'cu130', but this build is 'cpu'" in said


def test_sdist_has_the_files_of_the_sources(tmp_path):
    with tarfile.open(make_sdist(tmp_path)) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    top = {
        "CMakeLists.txt",
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    added = {"PKG-INFO", "setup.cfg", *(n for n in names if n.startswith("speechlm_ext.egg-info/"))}
    assert names - added == tracked("speechlm_ext", "csrc", "cmake", "recipes") | top


def test_a_torch_that_cannot_be_had_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    wheel = tmp_path / "any.whl"
    wheel.touch()
    monkeypatch.setattr(sys, "argv", ["check", str(wheel), "--torch", "2.6.0"])
    assert check.main() == 1
    printed = capsys.readouterr()
    assert "torch 2.6.0: skipped: No matching distribution found for torch==2.6.0" in printed.out
    assert "no check ran" in printed.err


def test_a_torch_that_takes_too_long_is_skipped(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "any.whl"
    wheel.touch()
    monkeypatch.setattr(sys, "argv", ["check", str(wheel), "--torch", "2.6.0", "--torch-seconds", "0.01"])
    assert check.main() == 1
    assert "torch 2.6.0: skipped: pip install torch==2.6.0 took more than 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdicts", "required", "code"),
    [
        (["passed"], [], 0),
        (["passed", "skipped"], [], 0),
        (["passed", "skipped"], ["0"], 0),
        (["passed", "skipped"], ["1"], 1),
        (["passed", "failed"], [], 1),
        (["skipped"], [], 1),
    ],
)
def test_exit_code_of_the_check(verdicts, required, code):
    outcomes = [Outcome(str(i), verdict, "") for i, verdict in enumerate(verdicts)]
    assert check.verdict(outcomes, required) == code
