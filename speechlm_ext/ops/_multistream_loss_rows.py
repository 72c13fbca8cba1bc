"""The row kernel of multistream_loss on a chunk of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops._native import native
from speechlm_ext.ops.reference.multistream_loss import LossOptions


def loss_rows(
    z: Tensor,
    chunk_rows: Tensor,
    targets: Tensor,
    live: Tensor,
    coef_loss: Tensor,
    coef_nll: Tensor | None,
    offsets: Tensor | None,
    streams: Sequence[tuple[int, bool, Sequence[tuple[int, int, int]]]],
    options: LossOptions,
    want_grad: bool,
    token_nll: Tensor | None,
    token_entropy: Tensor | None,
    stream_loss: Tensor,
    stream_correct: Tensor,
    column_sums: Tensor | None,
) -> None:
    """Losses of a chunk, and in place of its logits the streams' summed gradients; see ``multistream_loss.h``."""
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
    )
