"""Builds ``speechlm_ext._C`` by driving CMake and ninja; all metadata but the version is in pyproject.toml.

The build needs a C++17 compiler and the build requirements, nothing else: no torch, no nvcc, no GPU.
Objects are kept in ``build/cmake-<python tag>`` (with ``-cpu`` for SPEECHLM_CUDA=OFF), so a second build compiles only
what has changed.

Settings, from the environment:
    SPEECHLM_CUDA        AUTO (compile the .cu files when nvcc is found), ON, or OFF. Default AUTO.
    SPEECHLM_CUDA_ARCHS  e.g. "80;90a;100" (the default). Architectures that the toolkit does not know are
                         left out with a message; PTX of the newest general one is added.
    SPEECHLM_GLIBC       the oldest glibc to run on, e.g. 2.28 for manylinux_2_28. Default: this system's.
    SPEECHLM_LOCAL_VERSION  the wheel's local version: "cpu", or "cu130" for kernels of CUDA 13.0; refused unless it
                         is the variant that is built. Default: none.
    SPEECHLM_CUDA_PTX    OFF leaves out the PTX, for a build that serves this machine's card alone.
    SPEECHLM_GIT_COMMIT  the commit to record when the sources are no git checkout.
    MAX_JOBS             number of compilers at once. Default: the number of CPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The package's version, and after a plus the local one."""
    text = (ROOT / "speechlm_ext" / "__init__.py").read_text("utf-8")
    (public,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    local = os.environ.get("SPEECHLM_LOCAL_VERSION", "")
    return f"{public}+{local}" if local else public


def find_tool(name: str) -> str:
    """The path of cmake or ninja: from the build requirements, else from PATH."""
    try:
        module = __import__(name)
        attr = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
        candidate = Path(getattr(module, attr)) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise SystemExit(f"speechlm_ext: {name} is needed to build and was not found: pip install {name}")
    return found


def stable_pybind11_include(build_dir: Path) -> Path:
    """A copy of pybind11's headers under the build folder.

    pip's isolated builds unpack pybind11 into a new temporary folder each time; ninja would see other paths
    and times and compile everything again.
    """
    import pybind11

    target = build_dir / f"pybind11-{pybind11.__version__}"
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(target)
    return target


def git_commit() -> str:
    """The commit of the checkout, with "-dirty" if tracked files differ; "" when there is no git."""
    if "SPEECHLM_GIT_COMMIT" in os.environ:
        return os.environ["SPEECHLM_GIT_COMMIT"]
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class CMakeBuild(build_ext):
    """Configures and builds with CMake, then puts the module at the path that setuptools expects."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        env = os.environ
        cuda = env.get("SPEECHLM_CUDA", "AUTO")
        # A folder for each, because another mode compiles everything again.
        build_dir = ROOT / "build" / (f"cmake-{tag}-cpu" if cuda.upper() == "OFF" else f"cmake-{tag}")
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake"),
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYBIND11_INCLUDE_DIR={stable_pybind11_include(build_dir)}",
            f"-DSPEECHLM_CUDA={cuda}",
            f"-DSPEECHLM_CUDA_ARCHS={env.get('SPEECHLM_CUDA_ARCHS', '80;90a;100')}",
            f"-DSPEECHLM_GLIBC={env.get('SPEECHLM_GLIBC', '')}",
            f"-DSPEECHLM_LOCAL_VERSION={env.get('SPEECHLM_LOCAL_VERSION', '')}",
            f"-DSPEECHLM_CUDA_PTX={env.get('SPEECHLM_CUDA_PTX', 'ON')}",
            f"-DSPEECHLM_GIT_COMMIT={git_commit()}",
        ]
        jobs = env.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([find_tool("cmake"), "--build", str(build_dir), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"speechlm_ext: the native build failed (exit {error.returncode}); see above"
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        built = build_dir / "lib" / target.name
        # A new file, not an overwrite: a running process may have the old one mapped.
        partial = target.with_suffix(".partial")
        shutil.copy2(built, partial)
        os.replace(partial, target)


setup(
    version=version(),
    ext_modules=[Extension("speechlm_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
