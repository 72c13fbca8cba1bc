"""decode_attention: one query row of each request over its slot of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY
from speechlm_ext.ops.decode_layer import reference
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
LIBRARY.impl("decode_attention", reference.decode_attention, "CPU")
LIBRARY.impl("decode_attention", reference.decode_attention, "CUDA")


@torch.library.register_fake("speechlm_ext::decode_attention", lib=LIBRARY)
def _fake(query, keys, values, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1] * values.shape[3])
