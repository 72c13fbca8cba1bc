"""decode_attention: one query row of each request over its slot of the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native, stream_handle
from speechlm_ext.ops.decode_layer.registration import refuse_gradients


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slot: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of row m over rows ``max(0, lengths[m] - window)`` to ``lengths[m] - 1`` of ``slot[m]``.

    ``lengths`` and ``slot`` are read on the device. Keys are read in splits of a fixed size whose results are joined in
    order: a row's bits depend on its own slot and length alone.

    Args:
        query: float ``[M, H, E]``.
        keys, values: ``[B, R, G, E]`` and ``[B, R, G, F]`` in the dtype of ``query``, with H a multiple of G; slots and
            rows may have any stride. Rows outside of a request's are not read.
        lengths: int64 ``[M]``; above R counts as R.
        slot: int64 ``[M]``.
        scale: factor on ``q·k``.
        window: rows that are attended to; None: all.
        softcap: scores become ``softcap · tanh(score / softcap)``; None: they stay.
        sinks: float ``[H]``, a score of each head that takes part in the softmax and has no value; None: none.

    Returns:
        ``[M, H F]``, accumulated in float32 (float64 for float64); zeros where a length is 0 or less or a slot not in
        ``[0, B)``.

    Raises:
        OpError: (a ValueError) tensors that do not fit, or that require gradients.
    """
    refuse_gradients("decode_attention", query, keys, values, sinks)
    return torch.ops.speechlm_ext.decode_attention(
        query, keys, values, lengths, slot, scale, window, softcap, sinks
    )


LIBRARY.define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, Tensor slot, float scale, "
    "SymInt? window, float? softcap, Tensor? sinks) -> Tensor"
)


def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slot: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    on_cuda: bool,
) -> Tensor:
    if query.dim() != 3 or values.dim() != 4:
        raise OpError(
            "decode_attention: query must be [M, H, E] and values [B, R, G, F]; "
            f"got {describe(query)} and {describe(values)}"
        )
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    partials = None
    if on_cuda:
        count = call_kernel(native.decode_attention_partials, query, keys, values, window)
        partials = query.new_empty(count, dtype=wide)
    out = query.new_empty(query.shape[0], query.shape[1] * values.shape[3])
    call_kernel(
        native.decode_attention,
        query.contiguous(),
        keys,
        values,
        lengths.contiguous(),
        slot.contiguous(),
        scale,
        window,
        softcap,
        None if sinks is None else sinks.to(wide).contiguous(),
        out,
        partials,
        torch.get_num_threads(),
        stream_handle(query),
    )
    return out


_decode_attention_cuda = partial(_decode_attention, on_cuda=True)

LIBRARY.impl("decode_attention", partial(_decode_attention, on_cuda=False), "CPU")
LIBRARY.impl("decode_attention", _decode_attention_cuda, "CUDA")


@torch.library.register_fake("speechlm_ext::decode_attention", lib=LIBRARY)
def _fake(query, keys, values, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1] * values.shape[3])
