"""Options and results of one pass of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossOptions:
    """The settings that are numbers; see `speechlm_ext.ops.multistream_loss`."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None


@dataclass
class LossResult:
    """Sums over all rows, and the gradients of ``coef_loss · loss + coef_nll · nll`` where asked for."""

    stream_loss: Tensor  # [S] sum of coef_loss * loss
    stream_correct: Tensor  # [S]
    token_nll: Tensor | None  # [N, S]
    token_entropy: Tensor | None  # [N, S]
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_embed: Tensor | None = None
    grad_bias: Tensor | None = None
