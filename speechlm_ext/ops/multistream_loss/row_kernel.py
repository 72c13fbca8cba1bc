"""The row kernel of multistream_loss on either device: what Python owes it there besides the tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import native, stream_handle
from speechlm_ext.ops.multistream_loss.types import LossOptions

#: A stream that a chunk serves: its column of the targets, whether its column sums are wanted, its slices
#: ``(id, first column, count)``, which ascend and do not overlap.
Stream = tuple[int, bool, Sequence[tuple[int, int, int]]]


def loss_rows(
    z: Tensor,
    chunk_rows: Tensor,
    targets: Tensor,
    live: Tensor,
    coef_loss: Tensor,
    coef_nll: Tensor | None,
    offsets: Tensor | None,
    streams: Sequence[Stream],
    options: LossOptions,
    want_grad: bool,
    token_nll: Tensor | None,
    token_entropy: Tensor | None,
    stream_loss: Tensor,
    stream_correct: Tensor,
    column_sums: Tensor | None,
) -> None:
    """From a chunk of shared logits to losses and, in place of the logits, to their gradients.

    On CUDA it waits for nothing: the streams' slices travel as parameters of a kernel.

    Args:
        z: ``[R, C]`` float32 or float64, on CUDA also bfloat16 or float16; with ``want_grad`` it becomes the gradient
            of ``Σ coef_loss · loss + coef_nll · nll``. The other floats are float32, for float64 logits float64.
        chunk_rows: int64 ``[R]``, each row's place in the tensors ``[N, S]``. On the CPU one outside them is an error;
            on CUDA, where nobody has looked, it makes the losses NaN.
        targets, live, coef_loss, coef_nll: ``[N, S]``; int64, bool, float, float.
        offsets: ``[k, C]``, what each of the k streams adds to the logits.
        token_nll, token_entropy: ``[N, S]``, written where a target is live; None where not wanted.
        stream_loss, stream_correct: ``[k]`` float64 and int64, added to.
        column_sums: added to; the sums over the rows of those streams that want them, slice after slice.
    """
    needed = native.multistream_loss_workspace(z, targets.shape[1], streams, want_grad)
    workspace = torch.empty(needed, dtype=torch.uint8, device=z.device) if needed else None
    native.multistream_loss_rows(
        z,
        chunk_rows,
        targets,
        live,
        coef_loss,
        coef_nll,
        offsets,
        streams,
        options.z_loss,
        options.label_smoothing,
        options.softcap or 0.0,
        want_grad,
        token_nll,
        token_entropy,
        stream_loss,
        stream_correct,
        column_sums,
        torch.get_num_threads(),
        workspace,
        stream_handle(z),
    )
