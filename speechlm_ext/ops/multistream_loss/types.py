"""Inputs, requested outputs and results of one pass of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.multistream_loss.scopes import ScopeSets, unflatten


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of hidden's and weight's: on a GPU those of bfloat16 are rounded once, in forward, from sums in float32."""
    is_narrow = hidden.device.type == "cuda" and hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if is_narrow else sum_dtype(hidden.dtype)


class LossInputs(NamedTuple):
    """Inputs of a pass, in the order of the op's schema. A tuple, because `torch.compile` traces those in any torch."""

    hidden: Tensor
    """float ``[N, D]``."""
    weight: Tensor
    """float ``[V, D]``."""
    targets: Tensor
    """int64 ``[N, S]``."""
    live: Tensor
    """bool ``[N, S]``: the targets to compute."""
    coef_loss: Tensor
    """float ``[N, S]``: coefficient of each target's loss in the scalar whose gradients are computed."""
    scopes: list[int]
    """See `scopes.flatten`."""
    coef_nll: Tensor | None = None
    """float ``[N, S]``: coefficient of each target's bare NLL in that scalar."""
    row_scope: Tensor | None = None
    """int64 ``[N]``: index of each row's scope set; None with one set."""
    stream_embed: Tensor | None = None
    """float ``[S, D]``, or fewer rows: those of the last streams."""
    bias: Tensor | None = None
    """float ``[V]``."""
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float = 0.0
    """0: off."""
    rows: Tensor | None = None
    """int64: rows of every product, see `rows.LossRows`; None: found from ``live``."""
    row_counts: list[int] = []  # noqa: RUF012
    """Rows of each product."""
    narrow: bool = False
    """Whether float32 factors of the products are rounded to bfloat16."""

    @property
    def sets(self) -> ScopeSets:
        """Per kind of row, per stream, merged intervals."""
        return unflatten(self.scopes, self.targets.shape[1])

    def live_of(self, kind: int) -> Tensor:
        """bool ``[N, S]``: the live targets in rows of one kind."""
        return self.live if self.row_scope is None else self.live & (self.row_scope == kind)[:, None]

    def live_by_kind(self) -> Tensor:
        """bool ``[K, N, S]``: `live_of` every kind, in three launches."""
        if self.row_scope is None:
            return self.live[None]
        kinds = torch.arange(len(self.sets), device=self.row_scope.device)
        return self.live & (self.row_scope == kinds[:, None])[:, :, None]


class LossWants(NamedTuple):
    """Requested outputs besides each stream's sums, in the order of the op's schema."""

    gradients: list[bool]
    """Of hidden, weight, stream_embed and bias; those of inputs that are None are never computed."""
    token_nll: bool = False
    token_entropy: bool = False


@dataclass
class LossResult:
    """Sums over all rows, and the requested gradients of ``Σ coef_loss · loss + coef_nll · nll``."""

    stream_loss: Tensor
    """``[S]``: sums of coef_loss · loss."""
    stream_counts: Tensor
    """int64 ``[2, S]``: live targets that are the most likely id of their scope, and live targets."""
    token_nll: Tensor | None
    """``[N, S]``, 0 where not live."""
    token_entropy: Tensor | None
    """``[N, S]``, 0 where not live."""
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_embed: Tensor | None = None
    grad_bias: Tensor | None = None
