"""What a training step has to know on the host about a batch that is on a GPU.

Read from the batch while it is on the CPU. With it attention does not wait for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speechlm_ext.ops import LossRows, PackedBatch


@dataclass(frozen=True, eq=False)
class HostFacts:
    """Facts of one packed batch. :meth:`speechlm_ext.model.SpeechLMModel.facts` reads all of them, :meth:`read` those
    that need no model."""

    bounds: tuple[int, ...]
    """``cu_seqlens`` on the host: row at which each sequence starts, and N at the end."""
    loss_rows: LossRows | None = None
    """Rows of the loss's products; None: found on the device."""
    frame_rows_R: Tensor | None = None
    """Of a multi-scale model, int64: positions with a loss in streams 1 to S - 1, at least one; None: found on the
    device."""

    @classmethod
    def read(cls, batch: PackedBatch) -> HostFacts:
        """The facts of a batch on the CPU; on a GPU reading them waits for it."""
        return cls(tuple(batch.cu_seqlens.tolist()))

    def to(self, device: torch.device | str) -> HostFacts:
        """With the tensors on the batch's device; copies to a GPU do not wait for it."""
        loss_rows = None if self.loss_rows is None else self.loss_rows.to(device)
        rows_R = self.frame_rows_R
        if rows_R is not None:
            is_copy = torch.device(device).type == "cuda" and rows_R.device.type == "cpu"
            rows_R = rows_R.pin_memory().to(device, non_blocking=True) if is_copy else rows_R.to(device)
        return replace(self, loss_rows=loss_rows, frame_rows_R=rows_R)
