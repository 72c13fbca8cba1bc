"""multistream_embed: the sum of the embeddings of all streams of a row, plus continuous features.

Pads contribute exactly 0 whatever their table row is, and get no gradient. The gradients are in
:mod:`speechlm_ext.ops.scatter_sum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.dispatch import below_autograd
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
    partition_hint,
    stream_handle,
)

#: Streams that fit into a kernel's argument.
MAX_STREAMS = 64


def multistream_embed(
    ids: Tensor,
    table: Tensor,
    *,
    pad_id: int = 0,
    offsets: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    features: Tensor | None = None,
    feature_positions: Tensor | None = None,
    sparse: bool = False,
    check_ids: bool = False,
) -> Tensor:
    """Embed S ids per row and sum them; add continuous features to the rows that have them.

    ``out[n] = Σ_s scale[s] · table[ids[n, s] + offsets[s]]`` over the streams whose id is not ``pad_id``, plus
    ``features[m]`` where ``feature_positions[m] == n``.

    Args:
        ids: int32 or int64 ``[N, S]``, S up to 64.
        table: float ``[V, D]``; differentiable. One table for all streams, or several stacked, with ``offsets``.
        pad_id: id that contributes nothing, compared before ``offsets`` are added; any int, e.g. -1.
        offsets: row at which each stream's part of the table starts, S values; None is 0.
        scale: factor of each stream, S values; None is 1.
        features: float ``[M, D]``, e.g. of a speech encoder; differentiable. Converted to the table's dtype first,
            which is exact if it widens (bfloat16 features of autocast, a float32 table).
        feature_positions: int32 or int64 ``[M]``, distinct rows in ``[0, N)``, in any order.
        sparse: make the table's gradient a coalesced `torch.sparse_coo` tensor of the touched rows, bit-equal to those
            of the dense gradient; nothing of the table's size is allocated. For optimizers that take it (SGD,
            SparseAdam). On a GPU its backward synchronizes once, to read the number of rows, so it cannot be captured
            in a CUDA graph. It can be differentiated only once.
        check_ids: on a GPU, synchronize and raise for an id or position out of range and for a position that occurs
            twice, as always on the CPU. Without it there is no synchronization: such an id or position adds nothing,
            and of several features of one position the last is used.

    Returns:
        ``[N, D]`` in the table's dtype, also under autocast, like `F.embedding`; summed in float32 (float64 for a
        float64 table) and rounded once. Gradients are bit-equal in every run and for every number of threads.

    Raises:
        OpError: (a ValueError) shapes or dtypes that do not fit; a position that occurs twice.
        OpIndexError: (also an IndexError) an id outside the table, with row, stream and id, or a position outside the
            rows.
    """
    op = "multistream_embed"
    if ids.dim() != 2 or ids.dtype not in ID_DTYPES:
        raise OpError(f"{op}: ids must be int32 or int64 [N, S]; got {describe(ids)}")
    if table.dim() != 2 or table.dtype not in FLOAT_DTYPES:
        raise OpError(f"{op}: table must be float [V, D]; got {describe(table)}{partition_hint(table)}")
    if ids.device != table.device:
        raise OpError(f"{op}: ids is {describe(ids)} but table is on {table.device}")
    if ids.shape[1] > MAX_STREAMS:
        raise OpError(f"{op}: at most {MAX_STREAMS} streams; got {describe(ids)}")
    starts = [] if offsets is None else int_list(offsets, f"{op}: offsets", ids.shape[1])
    factors = [] if scale is None else float_list(scale, f"{op}: scale", ids.shape[1])
    if features is not None or feature_positions is not None:
        features = _checked_features(features, feature_positions, table)
    arguments = (ids, table, pad_id, starts, factors, features, feature_positions, sparse, check_ids)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The same result in less time: a decode step is so short that autograd's dispatch counts.
        with below_autograd():
            return _OP(*arguments)
    return _OP(*arguments)


def _checked_features(features: Tensor | None, positions: Tensor | None, table: Tensor) -> Tensor:
    """The features in the table's dtype."""
    op = "multistream_embed"
    if features is None or positions is None:
        missing = "features" if features is None else "feature_positions"
        raise OpError(f"{op}: features and feature_positions belong together; {missing} is None")
    width = table.shape[1]
    if features.dim() != 2 or features.dtype not in FLOAT_DTYPES or features.shape[1] != width:
        raise OpError(
            f"{op}: features must be float [M, {width}], as wide as the table; got {describe(features)}"
        )
    if tuple(positions.shape) != (features.shape[0],) or positions.dtype not in ID_DTYPES:
        raise OpError(
            f"{op}: feature_positions must be int32 or int64 [{features.shape[0]}], one row for each feature; got "
            f"{describe(positions)}"
        )
    for name, tensor in (("features", features), ("feature_positions", positions)):
        if tensor.device != table.device:
            raise OpError(f"{op}: {name} is {describe(tensor)} but table is on {table.device}")
    return features if features.dtype == table.dtype else features.to(table.dtype)


LIBRARY.define(
    "multistream_embed(Tensor ids, Tensor table, SymInt? pad_id, SymInt[] offsets, float[] scale, "
    "Tensor? features, Tensor? feature_positions, bool sparse, bool check_ids) -> Tensor"
)
_OP = torch.ops.speechlm_ext.multistream_embed.default


def _embed(
    ids: Tensor,
    table: Tensor,
    pad_id: int | None,
    offsets: list[int],
    scale: list[float],
    features: Tensor | None,
    positions: Tensor | None,
    sparse: bool,
    check_ids: bool,
    *,
    on_cuda: bool,
) -> Tensor:
    out = table.new_empty(ids.shape[0], table.shape[1])
    slots = bad = None
    if on_cuda:
        slots = None if features is None else ids.new_full((ids.shape[0],), -1, dtype=torch.int32)
        bad = ids.new_full((2,), ids.numel(), dtype=torch.int64) if check_ids else None
    bad_id, has_bad_positions = call_kernel(
        native.multistream_embed,
        *(ids.contiguous(), table.contiguous(), pad_id, offsets, scale),
        None if features is None else features.contiguous(),
        None if positions is None else positions.to(torch.int64).contiguous(),
        *(out, slots, bad, torch.get_num_threads(), stream_handle(ids)),
    )
    if bad is not None:  # the kernels leave the initial value if there is nothing bad
        first_bad, positions_flag = bad.tolist()
        bad_id = -1 if first_bad == ids.numel() else first_bad
        has_bad_positions = positions_flag != ids.numel()
    if has_bad_positions:
        _raise_bad_positions(positions, ids.shape[0])
    if bad_id >= 0:
        _raise_bad_id(ids, divmod(bad_id, ids.shape[1]), table.shape[0], offsets)
    return out


def _raise_bad_id(ids: Tensor, place: tuple[int, int], num_rows: int, offsets: Sequence[int]) -> None:
    n, s = place
    value = int(ids[n, s])
    shifted = f", with offset {offsets[s]} row {value + offsets[s]}" if any(offsets) else ""
    raise OpIndexError(
        f"multistream_embed: ids[{n}, {s}] (row {n}, stream {s}) is {value}{shifted}; the table has rows 0 to "
        f"{num_rows - 1}"
    )


def _raise_bad_positions(positions: Tensor | None, num_rows: int) -> None:
    assert positions is not None
    seen: dict[int, int] = {}
    for m, n in enumerate(positions.tolist()):
        if not 0 <= n < num_rows:
            raise OpIndexError(
                f"multistream_embed: feature_positions[{m}] is {n}; the output has rows 0 to {num_rows - 1}"
            )
        if n in seen:
            raise OpError(
                f"multistream_embed: feature_positions[{m}] and feature_positions[{seen[n]}] are both {n}; a row takes "
                "one feature: sum those of a row first"
            )
        seen[n] = m


_embed_cuda = partial(_embed, on_cuda=True)

LIBRARY.impl("multistream_embed", partial(_embed, on_cuda=False), "CPU")
LIBRARY.impl("multistream_embed", _embed_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_embed", lib=LIBRARY)
def _embed_fake(ids, table, pad_id, offsets, scale, features, positions, sparse, check_ids):  # type: ignore[no-untyped-def]
    return table.new_empty(ids.shape[0], table.shape[1])


# scatter_sum is the gradient of multistream_embed for the table, and multistream_embed that of scatter_sum for the
# values and of itself for the features, so all can be differentiated any number of times.


def _embed_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ids, table, *ctx.rule, _, positions, ctx.sparse, _ = inputs
    ctx.num_rows = table.shape[0]
    ctx.save_for_backward(ids, positions)


def _embed_backward(ctx, grad):  # type: ignore[no-untyped-def]
    ids, positions = ctx.saved_tensors
    grad_table = grad_features = None
    if ctx.needs_input_grad[1]:
        if ctx.sparse:
            sums, rows = torch.ops.speechlm_ext.scatter_sum_rows(grad, ids, *ctx.rule, ctx.num_rows)
            shape = (ctx.num_rows, grad.shape[1])
            grad_table = torch.sparse_coo_tensor(
                rows[None], sums, shape, is_coalesced=True, check_invariants=False
            )
        else:
            grad_table = torch.ops.speechlm_ext.scatter_sum(grad, ids, *ctx.rule, ctx.num_rows)
    if ctx.needs_input_grad[5]:
        # Rows of the gradient, and 0 for a position that a GPU ignored.
        grad_features = _OP(positions[:, None], grad, None, [], [], None, None, False, False)
    return None, grad_table, None, None, None, grad_features, None, None, None


torch.library.register_autograd(
    "speechlm_ext::multistream_embed", _embed_backward, setup_context=_embed_setup, lib=LIBRARY
)
