"""multistream_embed: the sum of the embeddings of all streams of a row; and segment_sum, its backward's core.

Pads contribute exactly 0 whatever their table row holds, and get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops._native import OpError, check, describe, int_list, partition_hint
from speechlm_ext.ops.reference import multistream_embed as reference


def multistream_embed(
    ids: Tensor,
    table: Tensor,
    *,
    pad_id: int = 0,
    offsets: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
) -> Tensor:
    """Embed S ids per row and sum them.

    ``out[n] = Σ_s scale[s] · table[ids[n, s] + offsets[s]]`` over the streams whose id is not ``pad_id``.

    Args:
        ids: int32 or int64 ``[N, S]``.
        table: float ``[V, D]``; differentiable. One table for all streams, or several stacked, with ``offsets``.
        pad_id: contributes nothing, compared before ``offsets`` are added; any int, e.g. -1.
        offsets: row at which each stream's part of the table starts, S values; None is 0.
        scale: factor of each stream, S values; None is 1.

    Returns:
        ``[N, D]`` in the table's dtype, summed in float32 (float64 for a float64 table).

    Raises:
        OpError: (a ValueError) for shapes or dtypes that do not fit, or on the CPU an id outside the table (row,
            stream and id are named).
    """
    op = "multistream_embed"
    check(
        ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64),
        f"{op}: ids must be int32 or int64 [N, S]; got {describe(ids)}",
    )
    check(
        table.dim() == 2 and table.is_floating_point(),
        f"{op}: table must be float [V, D]; got {describe(table)}" + partition_hint(table),
    )
    check(ids.device == table.device, f"{op}: ids is {describe(ids)} but table is on {table.device}")
    num_streams = ids.shape[1]
    if offsets is not None:
        offsets = int_list(offsets, f"{op}: offsets", num_streams)
        if not any(offsets):
            offsets = None
    if scale is not None:
        check(
            len(scale) == num_streams,
            f"{op}: scale must have {num_streams} values, one per stream; got {len(scale)}",
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(ids, table.shape[0], pad_id, offsets)
    if ids.numel() == 0:
        return table.new_zeros(ids.shape[0], table.shape[1]) + 0 * table.sum()
    return reference.multistream_embed(ids, table, pad_id, offsets, scale)


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum rows that belong together.

    Args:
        values: float ``[M, D]``; differentiable.
        segment_ids: int32 or int64 ``[M]`` in ``[0, num_segments)``, any order.
        num_segments: rows of the result.

    Returns:
        ``[num_segments, D]`` in the dtype of ``values``, summed in float32 or wider; rows without members are 0.

    Raises:
        OpError: (a ValueError) for shapes or dtypes that do not fit, or on the CPU an id out of range.
    """
    op = "segment_sum"
    check(
        values.dim() == 2 and values.is_floating_point(),
        f"{op}: values must be float [M, D]; got {describe(values)}",
    )
    check(
        tuple(segment_ids.shape) == (values.shape[0],) and segment_ids.dtype in (torch.int32, torch.int64),
        f"{op}: segment_ids must be int32 or int64 [{values.shape[0]}]; got {describe(segment_ids)}",
    )
    check(num_segments >= 0, f"{op}: num_segments must be 0 or more; got {num_segments}")
    if segment_ids.device.type == "cpu" and segment_ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in segment_ids.aminmax())
        check(
            low >= 0 and high < num_segments,
            f"{op}: segment_ids must be in [0, {num_segments}); got values from {low} to {high}",
        )
    return reference.segment_sum(values, segment_ids, num_segments)


def _check_range(ids: Tensor, num_rows: int, pad_id: int, offsets: Sequence[int] | None) -> None:
    """Two reductions when all is well; the search for the culprit comes only after."""
    if ids.numel() == 0:
        return
    if offsets is None:
        low, high = (int(v) for v in ids.aminmax())
        if 0 <= low and high < num_rows:
            return
    rows = ids if offsets is None else ids + torch.tensor(list(offsets), dtype=ids.dtype)
    bad = ((rows < 0) | (rows >= num_rows)) & (ids != pad_id)
    if bool(bad.any()):
        n, s = bad.nonzero()[0].tolist()
        raise OpError(
            f"multistream_embed: ids[{n}, {s}] (row {n}, stream {s}) is {int(ids[n, s])}"
            + (f", with offset {offsets[s]} row {int(rows[n, s])}" if offsets is not None else "")
            + f"; the table has rows 0 to {num_rows - 1}"
        )
