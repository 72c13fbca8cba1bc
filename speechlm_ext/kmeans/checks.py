"""What is asked of the rows of a fit, and of what comes out."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.sources import FeatureSource
from speechlm_ext.kmeans.survey import Data

_LOG = logging.getLogger("speechlm_ext")


def require_rows(data: Data, num_clusters: int) -> None:
    """Raises :class:`KMeansError`: fewer finite rows than clusters."""
    if data.num_usable < num_clusters:
        dropped = f" ({data.num_dropped} more are not finite)" if data.num_dropped else ""
        raise KMeansError(
            f"K-Means: {num_clusters} clusters need at least as many rows, got {data.num_usable}{dropped}. Give more "
            f"features to fit on, or ask for at most {data.num_usable} clusters."
        )


def require_width(source: FeatureSource, width: int) -> None:
    """Raises :class:`KMeansError`: rows that have not as many features as those of the fit."""
    if source.num_features != width:
        raise KMeansError(
            f"features: expected {width} features in each row, as in the fit, got {source.num_features}; use the "
            "encoder and layer that the centroids were fitted on."
        )


def warn_of_duplicates(centers: Tensor) -> None:
    """Log a warning where some of the centroids ``[K, F]`` are equal."""
    distinct = int(torch.unique(centers, dim=0).shape[0])
    if distinct < centers.shape[0]:
        _LOG.warning(
            "K-Means: %d of %d centroids are distinct: the features have too few different rows. The others are "
            "duplicates that no row is assigned to; ask for fewer clusters.",
            distinct,
            centers.shape[0],
        )
