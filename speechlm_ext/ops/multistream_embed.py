"""multistream_embed: the sum of the embeddings of all streams of a row; and segment_sum, its backward's core.

Pads contribute exactly 0 whatever their table row holds, and get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speechlm_ext.ops._native import (
    LIBRARY,
    OpIndexError,
    check,
    describe,
    int_list,
    native,
    partition_hint,
    stream_handle,
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: What fits into a kernel's argument.
MOST_STREAMS = 64


def multistream_embed(
    ids: Tensor,
    table: Tensor,
    *,
    pad_id: int = 0,
    offsets: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    check_ids: bool = False,
) -> Tensor:
    """Embed S ids per row and sum them.

    ``out[n] = Σ_s scale[s] · table[ids[n, s] + offsets[s]]`` over the streams whose id is not ``pad_id``.

    Args:
        ids: int32 or int64 ``[N, S]``, S up to 64.
        table: float ``[V, D]``; differentiable. One table for all streams, or several stacked, with ``offsets``.
        pad_id: contributes nothing, compared before ``offsets`` are added; any int, e.g. -1.
        offsets: row at which each stream's part of the table starts, S values; None is 0.
        scale: factor of each stream, S values; None is 1.
        check_ids: on a GPU, wait for the result and raise for an id outside the table, as the CPU always does. Without
            it such an id adds nothing there, and nothing waits.

    Returns:
        ``[N, D]`` in the table's dtype, summed in float32 (float64 for a float64 table) and rounded once. The gradient
        of the table is dense, and the same to the bit in every run and for every number of threads.

    Raises:
        OpError: (a ValueError) for shapes or dtypes that do not fit.
        OpIndexError: (an IndexError too) for an id outside the table; row, stream and id are named.
    """
    op = "multistream_embed"
    check(
        ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64),
        f"{op}: ids must be int32 or int64 [N, S]; got {describe(ids)}",
    )
    check(
        table.dim() == 2 and table.dtype in _DTYPES,
        f"{op}: table must be float [V, D]; got {describe(table)}{partition_hint(table)}",
    )
    check(ids.device == table.device, f"{op}: ids is {describe(ids)} but table is on {table.device}")
    num_streams = ids.shape[1]
    check(num_streams <= MOST_STREAMS, f"{op}: at most {MOST_STREAMS} streams; got {describe(ids)}")
    offsets = [] if offsets is None else int_list(offsets, f"{op}: offsets", num_streams)
    check(
        scale is None or len(scale) == num_streams,
        f"{op}: scale must have {num_streams} values, one per stream; got {0 if scale is None else len(scale)}",
    )
    factors = [] if scale is None else [float(v) for v in scale]
    return torch.ops.speechlm_ext.multistream_embed(ids, table, pad_id, offsets, factors, bool(check_ids))


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum rows that belong together.

    Args:
        values: float ``[M, D]``; differentiable.
        segment_ids: int32 or int64 ``[M]`` in ``[0, num_segments)``, any order.
        num_segments: rows of the result.

    Returns:
        ``[num_segments, D]`` in the dtype of ``values``, summed in float32 or wider; rows without members are 0.

    Raises:
        OpError: (a ValueError) for shapes or dtypes that do not fit.
        OpIndexError: (an IndexError too) on the CPU for an id out of range; on a GPU such a row is left out.
    """
    op = "segment_sum"
    check(
        values.dim() == 2 and values.dtype in _DTYPES,
        f"{op}: values must be float [M, D]; got {describe(values)}",
    )
    check(
        tuple(segment_ids.shape) == (values.shape[0],) and segment_ids.dtype in (torch.int32, torch.int64),
        f"{op}: segment_ids must be int32 or int64 [{values.shape[0]}]; got {describe(segment_ids)}",
    )
    check(num_segments >= 0, f"{op}: num_segments must be 0 or more; got {num_segments}")
    if segment_ids.device.type == "cpu" and segment_ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in segment_ids.aminmax())
        if low < 0 or high >= num_segments:
            raise OpIndexError(
                f"{op}: segment_ids must be in [0, {num_segments}); got values from {low} to {high}"
            )
    return torch.ops.speechlm_ext.scatter_sum(values, segment_ids[:, None], None, [], [], num_segments)


# torch.library registration. scatter_sum is the gradient of multistream_embed for the table, and multistream_embed that
# of scatter_sum for the values, so both can be differentiated as often as wanted.

LIBRARY.define(
    "multistream_embed(Tensor ids, Tensor table, SymInt? pad_id, SymInt[] offsets, float[] scale, bool check_ids) "
    "-> Tensor"
)
LIBRARY.define(
    "scatter_sum(Tensor values, Tensor ids, SymInt? pad_id, SymInt[] offsets, float[] scale, SymInt num_rows) -> Tensor"
)


def _embed_impl(
    ids: Tensor, table: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], check_ids: bool
) -> Tensor:
    out = table.new_empty(ids.shape[0], table.shape[1])
    on_cpu = ids.device.type == "cpu"
    nothing_bad = ids.numel()
    bad = ids.new_full((1,), nothing_bad, dtype=torch.int64) if on_cpu or check_ids else None
    native.multistream_embed(
        ids.contiguous(),
        table.contiguous(),
        pad_id,
        offsets,
        scale,
        out,
        bad,
        torch.get_num_threads(),
        stream_handle(ids),
    )
    if bad is not None and int(bad) != nothing_bad:
        _raise_bad_id(ids, divmod(int(bad), ids.shape[1]), table.shape[0], offsets)
    return out


def _raise_bad_id(ids: Tensor, place: tuple[int, int], num_rows: int, offsets: Sequence[int]) -> None:
    n, s = place
    value = int(ids[n, s])
    shifted = f", with offset {offsets[s]} row {value + offsets[s]}" if any(offsets) else ""
    raise OpIndexError(
        f"multistream_embed: ids[{n}, {s}] (row {n}, stream {s}) is {value}{shifted}; the table has rows 0 to "
        f"{num_rows - 1}"
    )


def _scatter_sum_cpu(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> Tensor:
    out = lazy_zeros(num_rows, values.shape[1], values.dtype)
    if out.numel() and ids.numel():
        native.scatter_sum(
            *(values.contiguous(), ids.contiguous(), pad_id, offsets, scale, out, None),
            *(torch.get_num_threads(), 0),
        )
    return out


def _scatter_sum_cuda(
    values: Tensor, ids: Tensor, pad_id: int | None, offsets: list[int], scale: list[float], num_rows: int
) -> Tensor:
    out = values.new_zeros(num_rows, values.shape[1])
    if out.numel() and ids.numel():
        size = native.scatter_sum_workspace(*ids.shape, *out.shape, values.dtype == torch.float64)
        workspace = torch.empty(size, dtype=torch.uint8, device=values.device)
        native.scatter_sum(
            *(values.contiguous(), ids.contiguous(), pad_id, offsets, scale, out, workspace),
            *(0, stream_handle(ids)),
        )
    return out


def lazy_zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose memory the operating system hands out page by page, when it is first written.

    A dense gradient of a large table is zero nearly everywhere: writing those zeros would cost more than the rest.
    """
    size = num_rows * width * dtype.itemsize
    if size == 0:
        return torch.zeros(num_rows, width, dtype=dtype)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(num_rows, width)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("multistream_embed", _embed_impl, _key)
LIBRARY.impl("scatter_sum", _scatter_sum_cpu, "CPU")
LIBRARY.impl("scatter_sum", _scatter_sum_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_embed", lib=LIBRARY)
def _embed_fake(ids, table, pad_id, offsets, scale, check_ids):  # type: ignore[no-untyped-def]
    return table.new_empty(ids.shape[0], table.shape[1])


@torch.library.register_fake("speechlm_ext::scatter_sum", lib=LIBRARY)
def _scatter_sum_fake(values, ids, pad_id, offsets, scale, num_rows):  # type: ignore[no-untyped-def]
    return values.new_empty(num_rows, values.shape[1])


def _embed_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ids, table, *ctx.rule, _ = inputs
    ctx.num_rows = table.shape[0]
    ctx.save_for_backward(ids)


def _embed_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    grad_table = torch.ops.speechlm_ext.scatter_sum(grad, ids, *ctx.rule, ctx.num_rows)
    return None, grad_table, None, None, None, None


def _scatter_sum_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ids, *ctx.rule, _ = inputs
    ctx.save_for_backward(ids)


def _scatter_sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    grad_values = torch.ops.speechlm_ext.multistream_embed(ids, grad, *ctx.rule, False)
    return grad_values, None, None, None, None, None


torch.library.register_autograd(
    "speechlm_ext::multistream_embed", _embed_backward, setup_context=_embed_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "speechlm_ext::scatter_sum", _scatter_sum_backward, setup_context=_scatter_sum_setup, lib=LIBRARY
)
