"""Calls the native row kernel of multistream_loss, on either device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import call_kernel, native, stream_handle
from speechlm_ext.ops.multistream_loss.types import LossInputs

#: A stream of a chunk: its column of the targets, whether it has a row of ``stream_bias``, whether its column sums
#: are wanted, and its scope as slices ``(first id, first column, count)``, which ascend and do not overlap.
Stream = tuple[int, bool, bool, Sequence[tuple[int, int, int]]]


@dataclass(frozen=True)
class RowOutputs:
    """Tensors that the kernel writes besides the logits; float32, or float64 for float64 logits, if not stated."""

    stream_loss: Tensor
    """float64 ``[S]``; added to, as are all sums."""
    stream_correct: Tensor
    """int64 ``[S]``."""
    stream_count: Tensor
    """int64 ``[S]``: live targets."""
    column_sums: Tensor | None = None
    """``[k, C]``: sums over rows of the gradients of the k streams that want them; untouched outside their scopes."""
    token_nll: Tensor | None = None
    """``[N, S]``; written where a target is live."""
    token_entropy: Tensor | None = None
    """``[N, S]``; written where a target is live."""


def loss_rows(
    z: Tensor,
    rows: Tensor,
    inputs: LossInputs,
    *,
    streams: Sequence[Stream],
    stream_bias: Tensor | None,
    out: RowOutputs,
    want_grad: bool,
) -> None:
    """Compute losses from a chunk of shared logits and replace the logits by their gradients.

    On CUDA there is no synchronization: the slices are passed as kernel parameters.

    Args:
        z: float32 or float64 ``[R, C]``, on CUDA also bfloat16 or float16; with ``want_grad`` it becomes the gradient
            of ``Σ coef_loss · loss + coef_nll · nll``.
        rows: int64 ``[R]``, each row's index in the tensors ``[N, S]``. An index out of range is an error on the CPU
            and makes the losses NaN on CUDA.
        inputs: coefficients are float32, or float64 for float64 logits; hidden, weight and scopes are not read.
        stream_bias: ``[k, C]``, added to the logits of the k streams that have a row; None for none.

    Raises:
        ValueError: shapes, dtypes, slices or (on the CPU) row indices that are not as above.
    """
    needed = native.multistream_loss_workspace(z, inputs.targets.shape[1], streams, want_grad)
    workspace = torch.empty(needed, dtype=torch.uint8, device=z.device) if needed else None
    call_kernel(
        native.multistream_loss_rows,
        z,
        rows,
        inputs.targets,
        inputs.live,
        inputs.coef_loss,
        inputs.coef_nll,
        stream_bias,
        streams,
        inputs.z_loss,
        inputs.label_smoothing,
        inputs.softcap,
        want_grad,
        out.token_nll,
        out.token_entropy,
        out.stream_loss,
        out.stream_correct,
        out.stream_count,
        out.column_sums,
        torch.get_num_threads(),
        workspace,
        stream_handle(z),
    )
