"""Compiles ``speechlm_ext._C`` in place for this machine's card, or finds it compiled from the same sources.

It needs no network, installs nothing, and asks setuptools for its command alone: versions before 77 refuse the
licence's form in pyproject.toml.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import time
from pathlib import Path

from benchmarks.common.emit import emit
from benchmarks.common.sources import digest_of_sources
from benchmarks.gpu_check.process import ROOT
from speechlm_ext.utils.files.io import atomic_write_text, make_folder, sha256_file


def compile_module(root: Path) -> None:
    """``setup.py build_ext --inplace`` of ``root``, without pyproject.toml.

    Raises:
        SystemExit: the compilers fail.
    """
    import setuptools

    found: dict[str, object] = {}
    setup, setuptools.setup = setuptools.setup, found.update
    before = os.getcwd()
    os.chdir(root)
    try:
        runpy.run_path(str(root / "setup.py"))
        distribution = setuptools.Distribution({"name": "speechlm_ext", **found})
        distribution.get_command_obj("build_ext").inplace = True
        distribution.run_command("build_ext")
    finally:
        setuptools.setup = setup
        os.chdir(before)


def main() -> None:
    """Build for the card at hand."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    os.environ.update(SPEECHLM_CUDA="ON", SPEECHLM_CUDA_ARCHS=arch, SPEECHLM_CUDA_PTX="OFF")
    stamp, begun = ROOT / "build" / "gpu-check" / "built", time.monotonic()
    digest = digest_of_sources(ROOT, arch)
    module = ROOT / "speechlm_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    def built() -> str:  # the module as well: another build may have replaced it
        return f"{digest} {sha256_file(module)}"

    is_there = module.is_file() and stamp.is_file() and stamp.read_text("utf-8") == built()
    if not is_there:
        compile_module(ROOT)
        make_folder(stamp.parent)
        atomic_write_text(stamp, built())
    from speechlm_ext.ops.common.native import native

    emit({"arch": f"sm_{arch}", "was_there": is_there, "seconds": round(time.monotonic() - begun, 1)})
    emit({"build_info": native.build_info()})


if __name__ == "__main__":
    main()
