"""Fixtures that the K-Means tests share."""

from python_tests.kmeans.conftest import features

__all__ = ["features"]
