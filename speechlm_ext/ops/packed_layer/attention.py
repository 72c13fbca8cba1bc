"""packed_attention: causal attention inside each sequence of a packed row, float32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native

#: Head sizes are multiples of it.
ATTENTION_LANES = 16


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Each row attends to the rows of its own sequence up to itself.

    The packed rows are read as they are: no padding and no copies. Rows of a sequence have the same bits whatever its
    neighbours in the pack and the number of threads.

    Args:
        q: float32 ``[N, H, E]`` on the CPU, E a multiple of :data:`ATTENTION_LANES`.
        k, v: float32 ``[N, G, E]``, H a multiple of G.
        cu_seqlens: int32 ``[n+1]`` on the CPU: sequence i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``.
        scale: factor on ``q·k``.
        window: rows that a row attends to, itself included; None: all before it.

    Returns:
        float32 ``[N, H, E]``.

    Raises:
        OpError: (a ValueError) tensors that do not fit.
    """
    if window is not None and window < 1:
        raise OpError(f"packed_attention: window must be 1 or more, or None; got {window}")
    return torch.ops.speechlm_ext.packed_attention(q, k, v, cu_seqlens, scale, window or 0)[0]


LIBRARY.define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int window) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int window, "
    "Tensor out, Tensor logsumexp) -> (Tensor, Tensor, Tensor)"
)


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    if q.dim() != 3 or k.dim() != 3:
        raise OpError(
            f"packed_attention: q and k must be float32 [N, H, E]; got {describe(q)}, {describe(k)}"
        )
    out, logsumexp = _new(q), q.new_empty(q.shape[:2])
    call_kernel(
        native.packed_attention,
        *(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens.contiguous(), scale, window),
        *(out, logsumexp, torch.get_num_threads()),
    )
    return out, logsumexp


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _new(q), _new(k), _new(v)
    call_kernel(
        native.packed_attention_backward,
        *(x.contiguous() for x in (grad, q, k, v, cu_seqlens)),
        *(scale, window, out.contiguous(), logsumexp, *grads, torch.get_num_threads()),
    )
    return grads


LIBRARY.impl("packed_attention", _attention, "CPU")
LIBRARY.impl("packed_attention_backward", _attention_backward, "CPU")


@torch.library.register_fake("speechlm_ext::packed_attention", lib=LIBRARY)
def _fake(q, k, v, cu_seqlens, scale, window):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2])


@torch.library.register_fake("speechlm_ext::packed_attention_backward", lib=LIBRARY)
def _backward_fake(grad, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, cu_seqlens, out, logsumexp = ctx.saved_tensors
    grads = torch.ops.speechlm_ext.packed_attention_backward(
        grad, q, k, v, cu_seqlens, ctx.scale, ctx.window, out, logsumexp
    )
    return *grads, None, None, None


torch.library.register_autograd("speechlm_ext::packed_attention", _gradient, setup_context=_save, lib=LIBRARY)
