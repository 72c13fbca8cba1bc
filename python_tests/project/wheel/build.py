"""``make wheel``: builds a wheel of this Python that installs on every Linux with glibc 2.28 or later.

``python -m python_tests.project.wheel.build [--variant cpu|cuda] [--out dist]``. The variant is the wheel's local
version: ``0.1.0+cpu``, or ``0.1.0+cu130`` with the kernels of CUDA 13.0. `auditwheel` grants the platform tag; it
refuses a module that needs a newer glibc or a library from outside. Objects of the last build are used again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from python_tests.compile_gate import find_nvcc, nvcc_release

ROOT = Path(__file__).resolve().parents[3]
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"


class WheelError(Exception):
    """A wheel cannot be built, or is not what it should be."""


def local_version(variant: str) -> str:
    """``cpu``, or ``cu130`` for the nvcc that the build finds."""
    if variant == "cpu":
        return "cpu"
    nvcc = find_nvcc()
    if nvcc is None:
        raise WheelError("the cuda variant needs nvcc 12.4 or later on PATH or in CUDA_HOME: none was found")
    return f"cu{nvcc_release(nvcc).replace('.', '')}"


def run(command: list[str | Path], **more: str) -> None:
    """Run a command with more environment; a failure shows its output."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-4000:]
        raise WheelError(f"{' '.join(map(str, command))} failed (exit {done.returncode}):\n{tail}")


def remove_leftovers() -> None:
    """Remove what setuptools keeps beside the sources and packs again, even modules that are gone from them."""
    for pattern in ("build/lib*", "build/bdist*", "speechlm_ext.egg-info"):
        for folder in ROOT.glob(pattern):
            shutil.rmtree(folder)


def build_wheel(variant: str, out: Path) -> Path:
    """Build the wheel into ``out``, in place of an earlier one of that name; returns its path.

    Raises:
        WheelError: no nvcc for the cuda variant, or a step fails.
    """
    local = local_version(variant)
    cuda = "OFF" if variant == "cpu" else "ON"
    remove_leftovers()
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as repaired:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-build-isolation",
        ]
        run(
            [*pip, "-w", plain, "."],
            SPEECHLM_CUDA=cuda,
            SPEECHLM_LOCAL_VERSION=local,
            SPEECHLM_GLIBC=GLIBC,
        )
        remove_leftovers()
        (wheel,) = Path(plain).glob("*.whl")
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--strip"]
        run([*repair, "-w", repaired, wheel])
        (wheel,) = Path(repaired).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["cpu", "cuda"], help="default: cuda if there is an nvcc")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    options = parser.parse_args()
    try:
        wheel = build_wheel(options.variant or ("cuda" if find_nvcc() else "cpu"), options.out)
    except WheelError as error:
        print(f"make wheel: {error}", file=sys.stderr)
        return 1
    print(f"{wheel} ({wheel.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
