"""What is asked of the machine and of the rows of a fit, and of what comes out."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.sources import FeatureSource
from speechlm_ext.kmeans.fit.scan import Data
from speechlm_ext.kmeans.settings import is_whole
from speechlm_ext.kmeans.words import counted

_LOG = logging.getLogger("speechlm_ext")


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device, if there is one of this name; None stays None.

    Raises:
        KMeansError: neither the CPU nor a GPU, or a GPU that this machine does not have.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise KMeansError(
            f"K-Means: device should be 'cpu', 'cuda' or 'cuda:N'; got {device!r}. Leave it out to work where the rows "
            "are."
        )
    missing = missing_gpu(found)
    if missing:
        raise KMeansError(
            f"K-Means: device should be one that is there; got {str(found)!r}, but {missing}. See `speechlm doctor`, "
            "or take 'cpu'."
        )
    return found


def missing_gpu(device: torch.device) -> str:
    """Words that say why a GPU cannot be used; none for one that is there, and for the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) < count:
        return ""
    return f"torch finds only {count}, counted from 0" if count else "torch finds no GPU"


def require_whole(name: str, value: Any) -> None:
    """Raises :class:`KMeansError`: neither None nor a whole number from 1."""
    if value is not None and not (is_whole(value) and value >= 1):
        raise KMeansError(f"K-Means: {name} should be None or a whole number from 1; got {value!r}.")


def require_rows(data: Data, num_clusters: int) -> None:
    """Raises :class:`KMeansError`: fewer finite rows than clusters."""
    if data.num_usable < num_clusters:
        dropped = f" ({data.num_dropped} more are not finite)" if data.num_dropped else ""
        raise KMeansError(
            f"K-Means: {num_clusters} clusters need at least as many rows, got {data.num_usable}{dropped}. Give more "
            f"features to fit on, or ask for at most {counted(data.num_usable, 'cluster')}."
        )


def require_width(source: FeatureSource, width: int) -> None:
    """Raises :class:`KMeansError`: rows that have not as many features as those of the fit."""
    if source.num_features != width:
        raise KMeansError(
            f"features: expected {counted(width, 'feature')} in each row, as in the fit, got {source.num_features}; "
            "use the encoder and layer that the centroids were fitted on."
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
