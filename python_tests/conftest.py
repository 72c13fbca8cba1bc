"""Shared fixtures: which devices a test runs on, and one thread per test process.

A test that takes the ``device`` fixture runs on the CPU, and on CUDA too where there is a device and a CUDA build;
elsewhere the CUDA case is skipped with the reason.
"""

from __future__ import annotations

import pytest
import torch


def cuda_missing() -> str:
    """Why CUDA tests cannot run here; "" when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    from speechlm_ext.ops._native import native

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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
