"""add_rms_norm: the residual sum and its RMSNorm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, call_kernel, native, stream_handle
from speechlm_ext.ops.decode_layer.registration import refuse_gradients


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x + residual``, and the sum.

    Args:
        x: float ``[M, D]``.
        residual: the same, or None for zeros.
        weight: ``[D]`` in the dtype of ``x``.
        eps: added to the mean of the squares.
        rounds_last: multiply by ``weight`` before the only rounding (OLMo-2's norm) instead of after it (Llama's). The
            same in float32.

    Returns:
        ``(normed, summed)``, ``[M, D]`` each in the dtype of ``x``. The norm is of the rounded sum, computed in float32
        (float64 for float64). ``summed`` is ``x`` itself without a residual.

    Raises:
        OpError: (a ValueError) tensors that do not fit, or that require gradients.
    """
    refuse_gradients("add_rms_norm", x, residual, weight)
    normed, summed = torch.ops.speechlm_ext.add_rms_norm(x, residual, weight, eps, rounds_last)
    return normed, x if residual is None else summed


LIBRARY.define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, bool rounds_last) -> (Tensor, Tensor)"
)


def _add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounds_last: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    normed, summed = torch.empty_like(x), x.new_empty(0)
    if residual is not None:
        residual, summed = residual.contiguous(), torch.empty_like(x)
    call_kernel(
        native.add_rms_norm,
        x,
        residual,
        weight.contiguous(),
        eps,
        rounds_last,
        normed,
        None if residual is None else summed,
        torch.get_num_threads(),
        stream_handle(x),
    )
    return normed, summed


LIBRARY.impl("add_rms_norm", _add_rms_norm, "CPU")
LIBRARY.impl("add_rms_norm", _add_rms_norm, "CUDA")


@torch.library.register_fake("speechlm_ext::add_rms_norm", lib=LIBRARY)
def _fake(x, residual, weight, eps, rounds_last):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
