"""Fixtures that the K-Means tests share."""

from python_tests.kmeans.conftest import _one_thread, features

__all__ = ["_one_thread", "features"]
