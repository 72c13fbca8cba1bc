"""The processes of a fit: each holds a share of the rows, in rank order, and all compute the same sums.

Only tensors are sent, never pickled objects. Everything but sums of exact numbers is gathered in rank order, so results
do not depend on the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, distributed

from speechlm_ext.errors import KMeansError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the fit; the default is a single process."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, wanted: bool | Literal["auto"]) -> Ranks:
        """The default group's ranks; one process if ``wanted`` is False, or "auto" and there is no group.

        Raises :class:`KMeansError`: it is True and there is none.
        """
        ready = distributed.is_available() and distributed.is_initialized()
        if wanted is True and not ready:
            raise KMeansError(
                "K-Means: distributed=True needs torch.distributed; call torch.distributed.init_process_group first "
                "(under torchrun), or leave distributed at 'auto'.",
                argument="distributed",
            )
        if wanted is False or not ready:
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        for tensor in tensors:
            self._reduce(tensor, distributed.ReduceOp.SUM)

    def max_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its elementwise maximum over the ranks."""
        for tensor in tensors:
            self._reduce(tensor, distributed.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, op: object) -> None:
        if self.size > 1:
            moved = tensor.to(_device()).contiguous()
            distributed.all_reduce(moved, op=op)
            tensor.copy_(moved)

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' ``[n_i, ...]`` concatenated in rank order; ``n_i`` may differ and may be 0."""
        if self.size == 1:
            return tensor
        lengths = self.gather_int(tensor.shape[0])
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:], device=_device())
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).to(tensor.device)

    def gather_int(self, value: int) -> list[int]:
        """All ranks' values, in rank order."""
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], device=_device())
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine)
        return torch.cat(parts).tolist()

    def raise_any(self, error: Exception | None) -> None:
        """Raise an error of any rank on every rank (KMeansError on the others), so that none waits for it."""
        text = b"" if error is None else f"rank {self.rank}: {error}".encode()
        texts = self.gather_bytes(text)
        if error is not None:
            raise error
        for other in texts:
            if other:
                raise KMeansError(other.decode())

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """All ranks' bytes, in rank order."""
        lengths = self.gather_int(len(data))
        mine = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return [part.numpy().tobytes() for part in self.gather(mine).split(lengths)]


def _device() -> torch.device:
    """Where the backend needs its tensors: NCCL on the GPU, gloo on the CPU."""
    return torch.device("cuda" if "nccl" in str(distributed.get_backend()) else "cpu")
