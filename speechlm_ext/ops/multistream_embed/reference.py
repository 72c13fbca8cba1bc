"""multistream_embed in plain torch, on `F.embedding_bag` and `index_add`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multistream_embed(
    ids: Tensor,
    table: Tensor,
    pad_id: int,
    offsets: Sequence[int] | None,
    scale: Sequence[float] | None,
    features: Tensor | None = None,
    feature_positions: Tensor | None = None,
) -> Tensor:
    """``Σ_s scale[s] · table[ids[:, s] + offsets[s]]`` over the ids that are not ``pad_id``, plus the features."""
    out = _embed_ids(ids, table, pad_id, offsets, scale)
    if features is not None and feature_positions is not None:
        out = out.index_add(0, feature_positions, features.to(out.dtype))
    return out


def _embed_ids(
    ids: Tensor, table: Tensor, pad_id: int, offsets: Sequence[int] | None, scale: Sequence[float] | None
) -> Tensor:
    is_simple = offsets is None and scale is None and 0 <= pad_id < table.shape[0]
    if is_simple:
        return F.embedding_bag(ids, table, mode="sum", padding_idx=pad_id)
    # Pads are dropped: with offsets no table row can represent them, and a row times 0 would propagate NaNs.
    is_real = ids != pad_id
    counts = is_real.sum(dim=1)
    starts = counts.cumsum(dim=0) - counts
    rows = ids
    if offsets is not None:
        rows = ids + torch.tensor(list(offsets), dtype=ids.dtype, device=ids.device)
    weights = None
    if scale is not None:
        weights = torch.tensor(list(scale), dtype=table.dtype, device=ids.device).expand(ids.shape)[is_real]
    return F.embedding_bag(rows[is_real], table, starts.to(ids.dtype), mode="sum", per_sample_weights=weights)
