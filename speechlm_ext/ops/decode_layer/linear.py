"""decode_linear: a linear layer whose result for a row does not depend on the other rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY, OpError, call_kernel, describe, native
from speechlm_ext.ops.decode_layer.registration import refuse_gradients


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias``, for few rows.

    On the CPU each value is one sum over K in a fixed order: a row's bits depend neither on the number of rows nor on
    its place among them, on the number of threads or the instruction set. On a GPU it is `F.linear`.

    Args:
        x: float ``[M, K]``.
        weight: the same dtype, ``[N, K]``; its rows may have any distance, such as those of a fused weight's part.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]``, summed in float32 (float64 for float64) and rounded once.

    Raises:
        OpError: (a ValueError) tensors that do not fit, or that require gradients.
    """
    refuse_gradients("decode_linear", x, weight, bias)
    return torch.ops.speechlm_ext.decode_linear(x, weight, bias)


LIBRARY.define("decode_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _decode_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2:
        raise OpError(
            f"decode_linear: x must be [M, K] and weight [N, K]; got {describe(x)} and {describe(weight)}"
        )
    out = x.new_empty(x.shape[0], weight.shape[0])
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    call_kernel(native.decode_linear, x.contiguous(), weight, bias, out, torch.get_num_threads())
    return out


LIBRARY.impl("decode_linear", _decode_linear_cpu, "CPU")
LIBRARY.impl("decode_linear", F.linear, "CUDA")


@torch.library.register_fake("speechlm_ext::decode_linear", lib=LIBRARY)
def _fake(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])
