"""rope_and_store: a step's queries and keys normed and rotated, keys and values written into the cache."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native, stream_handle
from speechlm_ext.ops.decode_layer.registration import refuse_gradients


def rope_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_over: Literal["head", "all"] = "head",
) -> Tensor:
    """Queries of a step, after norm and rotation; its keys and values go to their rows of the cache.

    The arithmetic is transformers': RMSNorm in float32, then ``x cos + rotate_half(x) sin`` in the wider dtype of ``x``
    and ``cos``.

    Args:
        qkv: float ``[M, H E + G E + G F]``: queries, keys and values of each row.
        cos, sin: ``[P, E]`` by position, in the dtype of ``qkv`` or float32; None for both: no rotation.
        position: int64 ``[M]``, the row of the cache and of the tables.
        slot: int64 ``[M]``. No two rows may have the same slot and position.
        keys, values: ``[B, R, G, E]`` and ``[B, R, G, F]`` in the dtype of ``qkv``, written in place; slots and rows
            may have any stride.
        num_heads: H.
        q_norm, k_norm: weights of an RMSNorm before the rotation, ``[E]`` over each head, or ``[H E]`` and ``[G E]``
            over all heads together; None for none.
        norm_eps: added to the mean of the squares.
        norm_over: "head" (Qwen3) or "all" (OLMo-2, which multiplies by the weight before it rounds).

    Returns:
        ``[M, H, E]``. A row whose slot is not in ``[0, B)``, or whose position is not in ``[0, R)`` and ``[0, P)``, is
        not written, and its queries are 0.

    Raises:
        OpError: (a ValueError) tensors that do not fit, or that require gradients.
    """
    refuse_gradients("rope_and_store", qkv, cos, sin, keys, values, q_norm, k_norm)
    if norm_over not in ("head", "all"):
        raise OpError(f"rope_and_store: norm_over must be 'head' or 'all'; got {norm_over!r}")
    return torch.ops.speechlm_ext.rope_and_store(
        qkv, cos, sin, position, slot, keys, values, num_heads, q_norm, k_norm, norm_eps, norm_over == "all"
    )


LIBRARY.define(
    "rope_and_store(Tensor qkv, Tensor? cos, Tensor? sin, Tensor position, Tensor slot, Tensor(a!) keys, "
    "Tensor(b!) values, SymInt num_heads, Tensor? q_norm, Tensor? k_norm, float norm_eps, bool norm_over_all) -> Tensor"
)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rope_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    norm_over_all: bool,
) -> Tensor:
    if num_heads < 0 or keys.dim() != 4:
        raise OpError(
            "rope_and_store: num_heads must be 0 or more and keys [B, R, G, E]; "
            f"got {num_heads} and {describe(keys)}"
        )
    query = qkv.new_empty(qkv.shape[0], num_heads, keys.shape[3])
    call_kernel(
        native.rope_and_store,
        qkv.contiguous(),
        _contiguous(cos),
        _contiguous(sin),
        position.contiguous(),
        slot.contiguous(),
        keys,
        values,
        num_heads,
        _contiguous(q_norm),
        _contiguous(k_norm),
        norm_eps,
        norm_over_all,
        query,
        torch.get_num_threads(),
        stream_handle(qkv),
    )
    return query


LIBRARY.impl("rope_and_store", _rope_and_store, "CPU")
LIBRARY.impl("rope_and_store", _rope_and_store, "CUDA")


@torch.library.register_fake("speechlm_ext::rope_and_store", lib=LIBRARY)
def _fake(qkv, cos, sin, position, slot, keys, values, num_heads, *rest):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape[0], num_heads, keys.shape[3])
