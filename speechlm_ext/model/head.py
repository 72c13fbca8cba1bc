"""The shared output head: one weight for all streams, and a small vector that tells the streams apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from speechlm_ext.model.config import LossSettings
from speechlm_ext.ops import MultiStreamLoss, multistream_loss


class MultiStreamHead(nn.Module):
    """``logits_s = (h + e_s) Wᵀ`` over each stream's scope.

    The module owns the weight and is called inside the model's forward, so that engines which partition
    parameters gather it at the right time. ``e_0`` is a constant zero: stream 0 sees ``h`` itself.

    Args:
        vocab_size, hidden_size, num_streams: V, D, S.
        scopes: per stream, the id ranges of its softmax in training.
        settings: loss settings.
        weight: share this ``[V, D]`` parameter (a tied embedding) instead of making one.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_streams: int,
        scopes: Sequence[Sequence[tuple[int, int]]],
        settings: LossSettings,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size)) if weight is None else weight
        self.stream_embed = (
            nn.Parameter(torch.empty(num_streams - 1, hidden_size)) if num_streams > 1 else None
        )
        self.scopes: list[list[tuple[int, int]]] = [[(int(a), int(b)) for a, b in scope] for scope in scopes]
        self.settings = settings

    def stream_vectors(self) -> Tensor | None:
        """``e_s`` as ``[S, D]``, or None with one stream."""
        if self.stream_embed is None:
            return None
        return torch.cat((self.stream_embed.new_zeros(1, self.stream_embed.shape[1]), self.stream_embed))

    def forward(
        self,
        hidden_ND: Tensor,
        targets_NS: Tensor,
        loss_weight_NS: Tensor,
        reduction: Literal["sum", "none"] = "sum",
    ) -> MultiStreamLoss:
        """Weighted cross-entropy over all streams; see :func:`speechlm_ext.ops.multistream_loss`."""
        return multistream_loss(
            hidden_ND,
            self.weight,
            targets_NS,
            loss_weight_NS,
            scopes=self.scopes,
            stream_embed=self.stream_vectors(),
            z_loss=self.settings.z_loss,
            label_smoothing=self.settings.label_smoothing,
            softcap=self.settings.softcap,
            reduction=reduction,
        )

    def scope_logits(
        self, hidden_BD: Tensor, ranges: Sequence[Sequence[tuple[int, int]] | None]
    ) -> list[Tensor | None]:
        """Logits over chosen id ranges only.

        Args:
            hidden_BD: float ``[B, D]``.
            ranges: per stream a list of ``(start, end)``, or None for a stream that is not sampled.

        Returns:
            Per stream float32 ``[B, V_s]`` with the ranges side by side, or None.
        """
        logits: list[Tensor | None] = []
        cap = self.settings.softcap
        for s, scope in enumerate(ranges):
            if scope is None:
                logits.append(None)
                continue
            h = hidden_BD if s == 0 or self.stream_embed is None else hidden_BD + self.stream_embed[s - 1]
            z = torch.cat([h @ self.weight[a:b].T for a, b in scope], dim=1).float()
            logits.append(z if cap is None else cap * torch.tanh(z / cap))
        return logits
