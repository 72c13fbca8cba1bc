"""Labels of rows by given centroids, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.errors import KMeansError
from speechlm_ext.kmeans.features.sources import FeatureSource, where
from speechlm_ext.kmeans.fit.scan import default_block_rows
from speechlm_ext.ops import CentroidIndex, kmeans_assign


def nearest_of(
    source: FeatureSource, centers: Tensor, *, device: torch.device, block_rows: int | None, may_drop: bool
) -> Tensor:
    """The nearest centroid of each row.

    Args:
        source: rows ``[N, F]``.
        centers: ``[K, F]``.
        device: where to work.
        block_rows: rows at a time; default about 32 MiB.
        may_drop: a row that is not finite has label -1; else it is an error.

    Returns:
        int32 ``[N]`` on ``device``.

    Raises:
        KMeansError: a row that is not finite, with its place.
    """
    dtype = torch.promote_types(source.dtype, centers.dtype)
    index = CentroidIndex.build(centers.to(device=device, dtype=dtype))
    labels = torch.empty(source.num_rows, dtype=torch.int32, device=device)
    rows = block_rows or default_block_rows(source.num_features)
    for first, block in source.blocks(0, source.num_rows, rows):
        found = kmeans_assign(block.to(device=device, dtype=dtype), index)
        if not may_drop and bool((found < 0).any()):
            bad = first + int((found < 0).nonzero()[0])
            raise KMeansError(
                f"features: {where(source, bad)} has a value that is not a finite number; mend the features, or label "
                'such rows -1 with nonfinite="drop".'
            )
        labels[first : first + block.shape[0]] = found
    return labels
