"""The ops' CUDA kernels compiled for the CPU, and a context in which the ops use them.

``load()`` builds the module (seconds when nothing changed); ``kernels_on_cpu(module, seed)`` makes every op run its
CUDA code on CPU tensors. docs/testing.md lists the faults that the shim finds and those that it cannot.

    cublas/     in place of the library of products
    include/    in place of CUDA's own headers, and of csrc's that says where tensors are
    kernel/     names that device code uses: indices, barriers, vectors, atomics, warp operations
    runtime/    fibers, launches, and the checks of every load and store
    launches/   budgets: counts of launches and syncs
    selftest/   kernels with planted faults, for test_shim.py
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda-on-cpu"
SEEDS = range(8)

#: Ops whose CUDA entry is another Python function than the CPU's: op name -> (module, function).
CUDA_ENTRIES = {
    "decode_attention": ("speechlm_ext.ops.decode_layer.attention", "_decode_attention_cuda"),
    "delay_pack_segments": ("speechlm_ext.ops.delay_pack.op", "_pack_segments_cuda"),
    "kmeans_assign": ("speechlm_ext.ops.kmeans_assign.kmeans_assign", "_assign_cuda"),
    "kmeans_sums": ("speechlm_ext.ops.kmeans_assign.sums", "_sums_cuda"),
    "kmeans_index": ("speechlm_ext.ops.kmeans_assign.index", "_index_cuda"),
    "multistream_embed": ("speechlm_ext.ops.multistream_embed.multistream_embed", "_embed_cuda"),
    "multistream_sample": ("speechlm_ext.ops.multistream_sample.multistream_sample", "_sample"),
    "multistream_sample_streams": ("speechlm_ext.ops.multistream_sample.multistream_sample", "_sample_some"),
    "scatter_sum": ("speechlm_ext.ops.scatter_sum.scatter_sum", "_scatter_sum_cuda"),
    "scatter_sum_rows": ("speechlm_ext.ops.scatter_sum.scatter_sum", "_scatter_sum_rows_cuda"),
}


class BuildError(Exception):
    """The kernels do not compile for the CPU."""


def tool(name: str) -> str:
    """cmake or ninja: beside this Python (the build requirements), else on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise BuildError(f"{name} is not installed: pip install {name}")
    return found


def build(folder: Path, target: str, source: Path = HERE, **options: str) -> Path:
    """Configure and build a target of a CMakeLists.txt, by default this folder's; returns the build folder.

    Raises:
        BuildError: it does not compile; the message has the compiler's output.
    """
    import pybind11

    options = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
        "Python_EXECUTABLE": sys.executable,
    } | options
    configure = [tool("cmake"), f"-S{source}", f"-B{folder}", "-GNinja"]
    configure += [f"-D{k}={v}" for k, v in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # one test process builds, the others wait for it
        for command in (configure, [tool("cmake"), "--build", str(folder), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return folder


@cache
def load() -> ModuleType:
    """Build and import the module with the kernels. Skips the test that calls it where the sources are not.

    Raises:
        BuildError: the kernels do not compile, or a tool is missing.
    """
    if not (ROOT / "csrc").is_dir():  # beside an installed wheel
        import pytest

        pytest.skip("the sources of the CUDA kernels are not here")
    folder = build(BUILD, "_cuda_on_cpu")
    (path,) = folder.glob("_cuda_on_cpu.*.so")
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Native:
    """Replaces ``speechlm_ext._C`` in the ops: each call may touch the memory of its own arguments only."""

    def __init__(self, shim: ModuleType, real: Any) -> None:
        self._shim, self._real = shim, real

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._shim, name, None)
        if function is None:
            return getattr(self._real, name)

        def call(*arguments: Any) -> Any:
            self._shim.forget_memory()
            return function(*arguments)

        return call


@contextlib.contextmanager
def kernels_on_cpu(shim: ModuleType, seed: int = 0) -> Iterator[None]:
    """Inside, ops on CPU tensors run their CUDA code, in an order of threads that ``seed`` decides.

    Fresh tensors are filled with NaN or the largest integer, so that an element that no thread writes is seen.
    """
    from speechlm_ext.ops.common import native as _native
    from speechlm_ext.ops.delay_pack import op as _delay_pack_op

    shim.set_seed(seed)
    modules = [
        m
        for n, m in sys.modules.items()
        if n.startswith("speechlm_ext.ops.") and hasattr(m, "native") and not hasattr(m, "__path__")
    ]
    before = torch.are_deterministic_algorithms_enabled()
    overrides = torch.library.Library("speechlm_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an overridden kernel, which is intended
        for op, (module, function) in CUDA_ENTRIES.items():
            entry = getattr(importlib.import_module(module), function)
            overrides.impl(op, entry, "CPU", allow_override=True)
    try:
        for module in modules:
            if module is not _native:
                module.native = _Native(shim, _native.native)  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)
        # Through the dispatcher, as on a GPU.
        with mock.patch.object(_delay_pack_op, "can_skip_dispatcher", new=lambda *tensors: False):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        for module in modules:
            module.native = _native.native  # type: ignore[attr-defined]
        overrides._destroy()
