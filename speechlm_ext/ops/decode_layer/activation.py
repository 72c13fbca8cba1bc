"""silu_mul: the gated activation of a SwiGLU layer, from gate and up in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native, stream_handle
from speechlm_ext.ops.decode_layer.registration import refuse_gradients


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    Args:
        gate_up: float ``[M, 2 I]``: the gates, then the values that they multiply.

    Returns:
        ``[M, I]`` in the same dtype; ``silu(gate)`` is computed in float32 (float64 for float64) and rounded before the
        product, as transformers' layers do.

    Raises:
        OpError: (a ValueError) a tensor that does not fit, or that requires gradients.
    """
    refuse_gradients("silu_mul", gate_up)
    return torch.ops.speechlm_ext.silu_mul(gate_up)


LIBRARY.define("silu_mul(Tensor gate_up) -> Tensor")


def _silu_mul(gate_up: Tensor) -> Tensor:
    if gate_up.dim() != 2:
        raise OpError(f"silu_mul: gate_up must be float [M, 2 I]; got {describe(gate_up)}")
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    call_kernel(native.silu_mul, gate_up.contiguous(), out, torch.get_num_threads(), stream_handle(gate_up))
    return out


LIBRARY.impl("silu_mul", _silu_mul, "CPU")
LIBRARY.impl("silu_mul", _silu_mul, "CUDA")


@torch.library.register_fake("speechlm_ext::silu_mul", lib=LIBRARY)
def _fake(gate_up):  # type: ignore[no-untyped-def]
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
