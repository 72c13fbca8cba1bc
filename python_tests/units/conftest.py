"""Fixtures of the units' tests; features and threads are those of the K-Means tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from python_tests.kmeans.conftest import _no_fsync, _one_thread, features, kmeans

__all__ = ["_no_fsync", "_one_thread", "features"]


@pytest.fixture
def pictures() -> None:
    """For tests that look at the picture of usage."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch) -> None:
    """Drawing takes most of a small fit's time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("speechlm_ext.units.inspect.draw_usage", lambda _, path: path.write_text(""))


@pytest.fixture(scope="session")
def shard_units(features, tmp_path_factory) -> Path:
    """Eight units of the feature shards, by the command line."""
    folder = tmp_path_factory.mktemp("shard_units")
    assert kmeans("fit", "--features", features, "--n_clusters", 8, "--output_dir", folder) == 0
    return folder
