"""segment_sum and scatter_sum_rows in plain torch, on `index_add`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """The distinct rows of all ids, ascending, and ``Σ scale[s] · values[n]`` for each."""
    num_streams = ids.shape[1]
    starts = torch.tensor(list(offsets or [0] * num_streams), dtype=torch.int64, device=ids.device)
    factors = torch.tensor(list(scale or [1.0] * num_streams), dtype=values.dtype, device=ids.device)
    is_real = torch.ones_like(ids, dtype=torch.bool) if pad_id is None else ids != pad_id
    rows, index = torch.unique((ids + starts)[is_real], return_inverse=True)
    sources = (values[:, None] * factors[None, :, None])[is_real]
    return rows, segment_sum(sources, index, len(rows))
