"""What a training step has to know on the host about a batch that is on a GPU.

Read from the batch while it is on the CPU. With it attention does not wait for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from speechlm_ext.ops import PackedBatch


@dataclass(frozen=True)
class HostFacts:
    """Facts of one packed batch."""

    bounds: tuple[int, ...]
    """``cu_seqlens`` on the host: row at which each sequence starts, and N at the end."""

    @classmethod
    def read(cls, batch: PackedBatch) -> HostFacts:
        """The facts of a batch on the CPU; on a GPU reading them waits for it."""
        return cls(tuple(batch.cu_seqlens.tolist()))
