"""RMSNorm, rotary positions and SwiGLU over packed rows: one pass forward and one backward, float32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native


def packed_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over the last axis.

    Args:
        x: float32 ``[N, D]`` on the CPU.
        weight: float32 ``[D]``.
        eps: added to the mean of the squares.

    Returns:
        float32 ``[N, D]``. The weight's gradient is summed over blocks of 64 rows in order: its bits do not depend on
        the number of threads.

    Raises:
        OpError: (a ValueError) tensors that do not fit.
    """
    return torch.ops.speechlm_ext.packed_rms_norm(x, weight, eps)[0]


def packed_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin``, the rotary position embedding of Llama.

    Args:
        x: float32 ``[N, H, E]`` on the CPU, E even.
        cos, sin: float32 ``[N, E]``; they get no gradient.

    Returns:
        float32 ``[N, H, E]``.

    Raises:
        OpError: (a ValueError) tensors that do not fit, or tables that require gradients.
    """
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise OpError("packed_rotary: cos and sin get no gradient; pass them detached")
    return torch.ops.speechlm_ext.packed_rotary(x, cos, sin, False)


def packed_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    Args:
        gate, up: float32 ``[N, I]`` on the CPU.

    Returns:
        float32 ``[N, I]``.

    Raises:
        OpError: (a ValueError) tensors that do not fit.
    """
    return torch.ops.speechlm_ext.packed_swiglu(gate, up)


LIBRARY.define("packed_rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define(
    "packed_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)"
)
LIBRARY.define("packed_rotary(Tensor x, Tensor cos, Tensor sin, bool is_backward) -> Tensor")
LIBRARY.define("packed_swiglu(Tensor gate, Tensor up) -> Tensor")
LIBRARY.define("packed_swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")


# ---- RMSNorm --------------------------------------------------------------------------------------------------------
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dim() != 2:
        raise OpError(f"packed_rms_norm: x must be float32 [N, D]; got {describe(x)}")
    x, weight = x.contiguous(), weight.contiguous()
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[0])
    call_kernel(native.packed_rms_norm, x, weight, eps, out, inverse, torch.get_num_threads())
    return out, inverse


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    call_kernel(
        native.packed_rms_norm_backward,
        *(grad.contiguous(), x, weight, inverse, grad_x, grad_weight, torch.get_num_threads()),
    )
    return grad_x, grad_weight


LIBRARY.impl("packed_rms_norm", _rms_norm, "CPU")
LIBRARY.impl("packed_rms_norm_backward", _rms_norm_backward, "CPU")


@torch.library.register_fake("speechlm_ext::packed_rms_norm", lib=LIBRARY)
def _rms_norm_fake(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


@torch.library.register_fake("speechlm_ext::packed_rms_norm_backward", lib=LIBRARY)
def _rms_norm_backward_fake(grad, x, weight, inverse):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    grad_x, grad_weight = torch.ops.speechlm_ext.packed_rms_norm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None


torch.library.register_autograd(
    "speechlm_ext::packed_rms_norm", _norm_gradient, setup_context=_save_norm, lib=LIBRARY
)


# ---- rotary positions -----------------------------------------------------------------------------------------------
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, is_backward: bool) -> Tensor:
    if x.dim() != 3:
        raise OpError(f"packed_rotary: x must be float32 [N, H, E]; got {describe(x)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call_kernel(
        native.packed_rotary,
        *(x.contiguous(), cos.contiguous(), sin.contiguous(), is_backward, out, torch.get_num_threads()),
    )
    return out


LIBRARY.impl("packed_rotary", _rotary, "CPU")


@torch.library.register_fake("speechlm_ext::packed_rotary", lib=LIBRARY)
def _rotary_fake(x, cos, sin, is_backward):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _save_rotary(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.is_backward = inputs[3]


def _rotary_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return torch.ops.speechlm_ext.packed_rotary(grad, cos, sin, not ctx.is_backward), None, None, None


torch.library.register_autograd(
    "speechlm_ext::packed_rotary", _rotary_gradient, setup_context=_save_rotary, lib=LIBRARY
)


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dim() != 2:
        raise OpError(f"packed_swiglu: gate must be float32 [N, I]; got {describe(gate)}")
    gate = gate.contiguous()
    out = torch.empty_like(gate)
    call_kernel(native.packed_swiglu, gate, up.contiguous(), out, torch.get_num_threads())
    return out


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call_kernel(
        native.packed_swiglu_backward,
        *(grad.contiguous(), gate, up, grad_gate, grad_up, torch.get_num_threads()),
    )
    return grad_gate, grad_up


LIBRARY.impl("packed_swiglu", _swiglu, "CPU")
LIBRARY.impl("packed_swiglu_backward", _swiglu_backward, "CPU")


@torch.library.register_fake("speechlm_ext::packed_swiglu", lib=LIBRARY)
def _swiglu_fake(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@torch.library.register_fake("speechlm_ext::packed_swiglu_backward", lib=LIBRARY)
def _swiglu_backward_fake(grad, gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.speechlm_ext.packed_swiglu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd(
    "speechlm_ext::packed_swiglu", _swiglu_gradient, setup_context=_save_swiglu, lib=LIBRARY
)
