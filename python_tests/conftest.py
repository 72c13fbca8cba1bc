"""Shared fixtures: which devices a test runs on, and one thread per test process.

A test that takes the ``device`` fixture runs three times: on the CPU; with the CUDA kernels compiled for the CPU
(``cuda_on_cpu``: the tensors are the CPU's, the code is the .cu file's); and on CUDA where there is a device and a CUDA
build, elsewhere that case is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Tensors of tests are small: with several threads in each of several test processes some tests take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from python_tests import cuda_on_cpu  # noqa: E402

# Another build of the kernels in place of the installed one: `make sanitize` gives one with a sanitizer in it.
if path := os.environ.get("SPEECHLM_TEST_NATIVE"):
    spec = importlib.util.spec_from_file_location("speechlm_ext._C", path)
    assert spec is not None and spec.loader is not None, f"SPEECHLM_TEST_NATIVE: {path} is no Python module"
    sys.modules["speechlm_ext._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["speechlm_ext._C"])


def cuda_missing() -> str:
    """Why CUDA tests cannot run here; "" when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    from speechlm_ext.ops.common.native import native

    if not native.build_info()["cuda_version"]:
        return "speechlm_ext was built without CUDA kernels"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    reason = cuda_missing()
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


CUDA_ON_CPU = "cuda_on_cpu"
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@contextmanager
def on_device(name: str, test: pytest.Item) -> Iterator[torch.device]:
    """The device of a test; while this lasts, ops on the CPU's tensors may run the CUDA kernels."""
    if name != CUDA_ON_CPU:
        yield torch.device(name)
        return
    # Another order of threads for every test, the same in every run.
    with cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load(), seed=zlib.crc32(test.nodeid.encode())):
        yield torch.device("cpu")


@pytest.fixture(params=["cpu", CUDA_ON_CPU, CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with on_device(request.param, request.node) as found:
        yield found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
