"""multistream_embed, segment_sum and scatter_sum_rows in plain torch, on `F.embedding_bag` and `index_add`."""

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
    # The pads are dropped: with offsets no table row is free to stand for them, and a row times 0 would carry NaNs.
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


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """``out[k] = Σ values[m]`` over the rows with ``segment_ids[m] == k``; summed in float32 or wider."""
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(num_segments, values.shape[1], dtype=dtype, device=values.device)
    return out.index_add(0, segment_ids, values.to(dtype)).to(values.dtype)


def scatter_sum_rows(
    values: Tensor,
    ids: Tensor,
    pad_id: int | None,
    offsets: Sequence[int] | None,
    scale: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    """The distinct rows that ids name, ascending, and ``Σ scale[s] · values[n]`` for each."""
    num_streams = ids.shape[1]
    starts = torch.tensor(list(offsets or [0] * num_streams), dtype=torch.int64, device=ids.device)
    factors = torch.tensor(list(scale or [1.0] * num_streams), dtype=values.dtype, device=ids.device)
    is_real = torch.ones_like(ids, dtype=torch.bool) if pad_id is None else ids != pad_id
    rows, place = torch.unique((ids + starts)[is_real], return_inverse=True)
    sources = (values[:, None] * factors[None, :, None])[is_real]
    return rows, segment_sum(sources, place, len(rows))
