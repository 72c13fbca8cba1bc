"""scatter_sum: sums of rows by index, as a whole table or its touched rows; the backward of multistream_embed.

Public functions: ``segment_sum`` and ``scatter_sum_rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.memory import empty_in_huge_pages, lazy_zeros
from speechlm_ext.ops.common.native import (
    FLOAT_DTYPES,
    ID_DTYPES,
    LIBRARY,
    OpError,
    OpIndexError,
    call_kernel,
    describe,
    float_list,
    int_list,
    native,
    stream_handle,
)


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sums of the rows of each segment.

    Args:
        values: float ``[M, D]``; differentiable.
        segment_ids: int32 or int64 ``[M]`` in ``[0, num_segments)``, any order.
        num_segments: rows of the result.

    Returns:
        ``[num_segments, D]`` in the dtype of ``values``, summed in float32 or wider; rows without members are 0.

    Raises:
        OpError: (a ValueError) shapes or dtypes that do not fit.
        OpIndexError: (also an IndexError) on the CPU, an id out of range; a GPU ignores such a row.
    """
    op = "segment_sum"
    if values.dim() != 2 or values.dtype not in FLOAT_DTYPES:
        raise OpError(f"{op}: values must be float [M, D]; got {describe(values)}")
    if tuple(segment_ids.shape) != (values.shape[0],) or segment_ids.dtype not in ID_DTYPES:
        raise OpError(
            f"{op}: segment_ids must be int32 or int64 [{values.shape[0]}]; got {describe(segment_ids)}"
        )
    if num_segments < 0:
        raise OpError(f"{op}: num_segments must be 0 or more; got {num_segments}")
    if segment_ids.device != values.device:
        raise OpError(f"{op}: segment_ids is {describe(segment_ids)} but values is on {values.device}")
    return torch.ops.speechlm_ext.scatter_sum(values, segment_ids[:, None], None, [], [], num_segments)


def scatter_sum_rows(
    values: Tensor,
    ids: Tensor,
    num_rows: int,
    *,
    pad_id: int | None = 0,
    offsets: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The touched rows of a table's gradient, without the table.

    ``sums[k] = Σ scale[s] · values[n]`` over all ``(n, s)`` with ``ids[n, s] + offsets[s] == rows[k]``.

    Args:
        values: float ``[N, D]``, the gradient of :func:`multistream_embed`'s result; differentiable.
        ids: int32 or int64 ``[N, S]``.
        num_rows: V, rows of the table.
        pad_id: id that is ignored, compared before ``offsets`` are added; None for none.
        offsets, scale: as for :func:`multistream_embed`.

    Returns:
        ``rows`` int64 ``[K]``, ascending and distinct, and ``sums`` ``[K, D]`` in the dtype of ``values``:
        bit-equal to those rows of the dense gradient. K depends on the ids: on a GPU the call synchronizes once, and
        tensors on "meta" cannot be used.

    Raises:
        OpError: (a ValueError) shapes or dtypes that do not fit.
        OpIndexError: (also an IndexError) on the CPU, an id outside the table; a GPU ignores it.
    """
    op = "scatter_sum_rows"
    if ids.dim() != 2 or ids.dtype not in ID_DTYPES:
        raise OpError(f"{op}: ids must be int32 or int64 [N, S]; got {describe(ids)}")
    if values.dim() != 2 or values.dtype not in FLOAT_DTYPES or values.shape[0] != ids.shape[0]:
        raise OpError(f"{op}: values must be float [{ids.shape[0]}, D]; got {describe(values)}")
    if values.device != ids.device:
        raise OpError(f"{op}: ids is {describe(ids)} but values is on {values.device}")
    if num_rows < 0:
        raise OpError(f"{op}: num_rows must be 0 or more; got {num_rows}")
    num_streams = ids.shape[1]
    starts = [] if offsets is None else int_list(offsets, f"{op}: offsets", num_streams)
    factors = [] if scale is None else float_list(scale, f"{op}: scale", num_streams)
    sums, rows = torch.ops.speechlm_ext.scatter_sum_rows(values, ids, pad_id, starts, factors, num_rows)
    return rows, sums


#: The last arguments of the op multistream_embed: no features, dense, unchecked.
_PLAIN = (None, None, False, False)
_RULE = "SymInt? pad_id, SymInt[] offsets, float[] scale, SymInt num_rows"
LIBRARY.define(f"scatter_sum(Tensor values, Tensor ids, {_RULE}) -> Tensor")
LIBRARY.define(f"scatter_sum_rows(Tensor values, Tensor ids, {_RULE}) -> (Tensor, Tensor)")


def _scatter_sum_cpu(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> Tensor:
    out = lazy_zeros(num_rows, values.shape[1], values.dtype)
    if ids.numel():
        pairs = _sort_cpu("scatter_sum", ids, pad_id, offsets, num_rows)
    if out.numel() and ids.numel():
        call_kernel(native.scatter_sum, values.contiguous(), pairs, scale, out, None, torch.get_num_threads())
    return out


def _sort_cpu(op: str, ids: Tensor, pad_id: int | None, offsets: list[int], num_rows: int) -> Any:
    """The native pairs, sorted by row; refuses ids outside the table."""
    pairs = call_kernel(native.sort_pairs, ids.contiguous(), pad_id, offsets, num_rows)
    if pairs.first_bad < 0:
        return pairs
    n, s = divmod(pairs.first_bad, ids.shape[1])
    value = int(ids[n, s])
    if op == "scatter_sum" and ids.shape[1] == 1 and pad_id is None and not offsets:
        raise OpIndexError(f"segment_sum: segment_ids[{n}] is {value}; it must be in [0, {num_rows})")
    raise OpIndexError(
        f"{op}: ids[{n}, {s}] (row {n}, stream {s}) is {value}; the table has {num_rows} rows"
        + (f", and offsets are {list(offsets)}" if any(offsets) else "")
    )


def _scatter_sum_rows_cpu(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> tuple[Tensor, Tensor]:
    pairs = _sort_cpu("scatter_sum_rows", ids, pad_id, offsets, num_rows)
    rows = ids.new_empty(pairs.touched, dtype=torch.int64)
    out = empty_in_huge_pages(pairs.touched, values.shape[1], values.dtype)
    call_kernel(native.scatter_sum, values.contiguous(), pairs, scale, out, rows, torch.get_num_threads())
    return out, rows


def _sort_cuda(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], num_rows: int, touched: Tensor | None
) -> Tensor:
    """The workspace, containing the sorted pairs."""
    size = call_kernel(native.scatter_sum_workspace, values.contiguous(), ids.shape[1], num_rows)
    workspace = torch.empty(size, dtype=torch.uint8, device=values.device)
    call_kernel(
        native.sort_pairs_cuda,
        ids.contiguous(),
        pad_id,
        offsets,
        num_rows,
        workspace,
        touched,
        stream_handle(ids),
    )
    return workspace


def _scatter_sum_cuda(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> Tensor:
    if ids.numel() == 0:
        return values.new_zeros(num_rows, values.shape[1])
    out = values.new_empty(num_rows, values.shape[1])
    if out.numel():
        workspace = _sort_cuda(values, ids, pad_id, offsets, num_rows, None)
        shape = (ids.shape[1], num_rows)
        call_kernel(
            native.scatter_sum_cuda,
            values.contiguous(),
            *shape,
            scale,
            out,
            None,
            workspace,
            stream_handle(ids),
        )
    return out


def _scatter_sum_rows_cuda(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> tuple[Tensor, Tensor]:
    touched = ids.new_zeros(1, dtype=torch.int64)
    workspace = _sort_cuda(values, ids, pad_id, offsets, num_rows, touched) if ids.numel() else None
    count = int(touched)  # the only synchronization
    rows = ids.new_empty(count, dtype=torch.int64)
    out = values.new_empty(count, values.shape[1])
    if count:
        shape = (ids.shape[1], num_rows)
        call_kernel(
            native.scatter_sum_cuda,
            values.contiguous(),
            *shape,
            scale,
            out,
            rows,
            workspace,
            stream_handle(ids),
        )
    return out, rows


LIBRARY.impl("scatter_sum", _scatter_sum_cpu, "CPU")
LIBRARY.impl("scatter_sum", _scatter_sum_cuda, "CUDA")
LIBRARY.impl("scatter_sum_rows", _scatter_sum_rows_cpu, "CPU")
LIBRARY.impl("scatter_sum_rows", _scatter_sum_rows_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::scatter_sum", lib=LIBRARY)
def _scatter_sum_fake(values, ids, pad_id, offsets, scale, num_rows):  # type: ignore[no-untyped-def]
    return values.new_empty(num_rows, values.shape[1])


@torch.library.register_fake("speechlm_ext::scatter_sum_rows", lib=LIBRARY)
def _scatter_sum_rows_fake(values, ids, pad_id, offsets, scale, num_rows):  # type: ignore[no-untyped-def]
    touched = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty(touched, values.shape[1]), ids.new_empty(touched, dtype=torch.int64)


def _scatter_sum_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ids, *ctx.rule, _ = inputs
    ctx.save_for_backward(ids)


def _scatter_sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    grad_values = torch.ops.speechlm_ext.multistream_embed(ids, grad, *ctx.rule, *_PLAIN)
    return grad_values, None, None, None, None, None


def _scatter_sum_rows_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ids, ctx.pad_id, ctx.offsets, ctx.scale, _ = inputs
    ctx.save_for_backward(ids, output[1])


def _scatter_sum_rows_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    """The backward of scatter_sum, with each id replaced by its row's index among the touched rows."""
    ids, rows = ctx.saved_tensors
    at = ids.long() + torch.tensor(ctx.offsets, device=ids.device) if ctx.offsets else ids.long()
    index = torch.searchsorted(rows, at)
    is_touched = torch.cat([rows, rows.new_full((1,), -1)])[index] == at
    if ctx.pad_id is not None:
        is_touched = is_touched & (ids != ctx.pad_id)
    index = index.masked_fill(~is_touched, -1)
    grad_values = torch.ops.speechlm_ext.multistream_embed(index, grad, -1, [], ctx.scale, *_PLAIN)
    return grad_values, None, None, None, None, None


torch.library.register_autograd(
    "speechlm_ext::scatter_sum", _scatter_sum_backward, setup_context=_scatter_sum_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "speechlm_ext::scatter_sum_rows",
    _scatter_sum_rows_backward,
    setup_context=_scatter_sum_rows_setup,
    lib=LIBRARY,
)
