"""The native build: libraries that the module needs, its build info, errors of the build, and the C++ tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from python_tests import cuda_on_cpu
from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")


def tool(name: str) -> str:
    """cmake or ninja; without it the test is skipped."""
    try:
        return cuda_on_cpu.tool(name)
    except cuda_on_cpu.BuildError as error:
        pytest.skip(str(error))


def configure(build: Path, env: dict[str, str] | None = None, **options: str) -> subprocess.CompletedProcess:
    command = [tool("cmake"), f"-S{ROOT}", f"-B{build}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *(f"-D{k}={v}" for k, v in options.items())]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF headers")
def test_module_needs_no_torch_no_driver_and_no_second_openmp():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    out = subprocess.run(
        ["readelf", "-d", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", out)
    assert needed, out
    foreign = [n for n in needed if re.search(r"torch|c10|cuda|gomp|omp", n)]
    assert foreign == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's library has another name elsewhere")
def test_shares_torchs_openmp():
    assert OPENMP_RUNTIME, "no OpenMP runtime found in torch"
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert os.path.realpath(OPENMP_RUNTIME) in {os.path.realpath(p) for p in loaded}
    assert Path(torch.__file__).parent.parent in Path(OPENMP_RUNTIME).parents


def test_build_info():
    info = native.build_info()
    assert set(info) == {"version", "variant", "commit", "compiler", "cuda_version", "cuda_archs"}
    assert re.match(r"\w+ \d+\.\d+", info["compiler"])
    if info["cuda_version"]:
        assert info["variant"] == f"cu{info['cuda_version'].replace('.', '')}"
        assert "80-real" in info["cuda_archs"] and info["cuda_archs"].endswith("-virtual")


def test_cuda_on_without_nvcc_is_a_clear_error(tmp_path):
    result = configure(tmp_path, env={"CUDACXX": str(tmp_path / "nvcc")}, SPEECHLM_CUDA="ON")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "SPEECHLM_CUDA=ON, but no nvcc was found" in message
    assert "SPEECHLM_CUDA=OFF" in message


def test_unknown_cuda_mode_is_refused(tmp_path):
    result = configure(tmp_path, SPEECHLM_CUDA="MAYBE")
    assert result.returncode != 0 and "it must be AUTO, ON or OFF" in " ".join(result.stderr.split())


def test_cpp_tests():
    """Builds and runs the C++ test program, with the address and undefined-behaviour sanitizers.

    The build folder is kept, so that a second run compiles only what has changed.
    """
    for name in ("cmake", "ninja"):
        tool(name)
    build = cuda_on_cpu.build(
        ROOT / "build" / "cpp-tests",
        "speechlm_tests",
        ROOT,
        SPEECHLM_CUDA="OFF",
        SPEECHLM_BUILD_TESTS="ON",
        CMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1",
        # Half the time: only the tested ops, with the optimization that sanitizers are made for.
        SPEECHLM_OPTIMIZE="-O1",
        SPEECHLM_OPS="delay_pack;multistream_embed;scatter_sum",
    )
    done = subprocess.run([str(build / "speechlm_tests")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed, 0 failed", done.stdout)
