"""The shared output head: one weight for all streams, and a vector per stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speechlm_ext.errors import ConfigError
from speechlm_ext.model.config import LossSettings
from speechlm_ext.model.frame import Frames
from speechlm_ext.model.frame_loss import FrameRows, frame_rows, unrolled, unrolled_kinds
from speechlm_ext.ops import (
    LossRows,
    MultiStreamLoss,
    multistream_logprobs,
    multistream_loss,
    plan_loss_rows,
    separate_head_rows,
)
from speechlm_ext.ops.multistream_loss.arguments import Heads, head_rows


class MultiStreamHead(nn.Module):
    """``logits_s = (h + e_s) Wᵀ + b`` over each stream's scope.

    The module owns the weight and is called inside the model's forward, so that engines which partition
    parameters gather it at the right time. Stream 0 has no vector: it sees ``h`` itself.

    Args:
        vocab_size, hidden_size, num_streams: V, D, S.
        scopes: per stream, the id ranges of its softmax in training; with ``contents`` a list of these, one for each
            range of ``contents`` and one for rows that belong to none of them.
        settings: loss settings.
        weight: share this ``[V, D]`` parameter (a tied embedding) instead of making one.
        heads: ``shared``, or ``separate`` for rows of every stream's own: ``[rows, D]`` in the order that
            :func:`speechlm_ext.ops.multistream_loss` defines, and no stream vectors.
        contents: id ranges ``(start, end)`` of stream 0 that define a row's kind; see :meth:`row_scope`.
        has_bias: add a bias to the logits, one value for each row of the weight; zero at first.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_streams: int,
        scopes: Sequence[Any],
        settings: LossSettings,
        weight: nn.Parameter | None = None,
        heads: Heads = "shared",
        contents: Sequence[tuple[int, int]] | None = None,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.scopes, self.contents, self.heads, self.settings = scopes, contents, heads, settings
        separate = heads == "separate"
        if separate:
            vocab_size = separate_head_rows(scopes)
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size)) if weight is None else weight
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[0])) if has_bias else None
        self.stream_embed = (
            nn.Parameter(torch.empty(num_streams - 1, hidden_size))
            if num_streams > 1 and not separate
            else None
        )

    def stream_vectors(self) -> Tensor | None:
        """``e_s`` as ``[S, D]``, zeros for stream 0; None with one stream or separate heads."""
        if self.stream_embed is None:
            return None
        return torch.cat((self.stream_embed.new_zeros(1, self.stream_embed.shape[1]), self.stream_embed))

    def row_scope(self, targets_NS: Tensor, loss_weight_NS: Tensor) -> Tensor | None:
        """Index of each row's scope, int64 ``[N]``; None when all rows use the same.

        ``loss_weight_NS`` may be a mask. A row whose target in stream 0 is in a range of ``contents`` has its kind. A
        special token (an end) has the kind of the content right before it, if there is any. Rows without a loss in
        stream 0 keep the kind of the row before.
        """
        if self.contents is None:
            return None
        target_N, has_loss_N = targets_NS[:, 0], loss_weight_NS[:, 0] > 0
        kind_N = torch.full_like(target_N, len(self.contents), dtype=torch.int64)
        for number, (start, end) in enumerate(self.contents):
            kind_N = torch.where(has_loss_N & (target_N >= start) & (target_N < end), number, kind_N)
        unknown_N = kind_N == len(self.contents)
        before_N = torch.cat((kind_N.new_full((1,), len(self.contents)), kind_N))[: len(kind_N)]
        kind_N = torch.where(unknown_N & has_loss_N, before_N, kind_N)
        place_N = torch.arange(len(kind_N), device=kind_N.device)
        last_N = torch.where(has_loss_N, place_N, 0).cummax(0).values if len(kind_N) else place_N
        return kind_N[last_N]

    def forward(
        self,
        hidden_ND: Tensor,
        targets_NS: Tensor,
        loss_weight_NS: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        frames: Frames | None = None,
        rows: LossRows | None = None,
    ) -> MultiStreamLoss:
        """Weighted cross-entropy over all streams; see :func:`speechlm_ext.ops.multistream_loss`.

        Args:
            hidden_ND: of all streams, or with ``frames`` of stream 0.
            frames: hidden states of the other streams of a multi-scale model.
            rows: of :meth:`plan_rows`. With them no value in the tensors is checked on a GPU and nothing waits for it:
                labels and weights are those of :func:`speechlm_ext.ops.delay_pack`, and a label outside its scope makes
                the loss NaN.
        """
        settings = self.settings
        inputs, options, unrolled = self._op_arguments(hidden_ND, targets_NS, loss_weight_NS, frames)
        out = multistream_loss(
            *inputs,
            z_loss=settings.z_loss,
            label_smoothing=settings.label_smoothing,
            reduction=reduction,
            recompute=settings.recompute,
            rows=rows,
            check_values=rows is None or hidden_ND.device.type == "cpu",
            **options,
        )
        if unrolled is None or out.token_nll is None:
            return out
        return out._replace(token_nll=unrolled.unroll(out.token_nll))

    def plan_rows(
        self, targets_NS: Tensor, loss_weight_NS: Tensor, frame_rows_R: Tensor | None = None
    ) -> LossRows:
        """Rows of the op's products, from a batch on the CPU; ``frame_rows_R``: the frames of a multi-scale model."""
        kind_N = self.row_scope(targets_NS, loss_weight_NS)
        if frame_rows_R is None:
            return plan_loss_rows(loss_weight_NS, scopes=self.scopes, row_scope=kind_N, heads=self.heads)
        kind_M = unrolled_kinds(kind_N, frame_rows_R, *targets_NS.shape)
        weight_MS = unrolled(loss_weight_NS, frame_rows_R)
        return plan_loss_rows(weight_MS, scopes=self._frame_scopes(), row_scope=kind_M)

    def logprobs(
        self, hidden_ND: Tensor, targets_NS: Tensor, mask_NS: Tensor, frames: Frames | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies; see :func:`speechlm_ext.ops.multistream_logprobs`."""
        inputs, options, rows = self._op_arguments(hidden_ND, targets_NS, mask_NS, frames)
        logprobs, entropy = multistream_logprobs(*inputs, **options)
        return (logprobs, entropy) if rows is None else (rows.unroll(logprobs), rows.unroll(entropy))

    def _op_arguments(
        self, hidden_ND: Tensor, targets_NS: Tensor, weight_NS: Tensor, frames: Frames | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any], FrameRows | None]:
        """Inputs and options of both ops, and the rows of a multi-scale batch."""
        options: dict[str, Any] = {"bias": self.bias, "softcap": self.settings.softcap}
        if frames is None:
            options |= {"scopes": self.scopes, "row_scope": self.row_scope(targets_NS, weight_NS)}
            options |= {"heads": self.heads, "stream_embed": self.stream_embed}
            return (hidden_ND, self.weight, targets_NS, weight_NS), options, None
        rows = self._frame_rows(hidden_ND, targets_NS, weight_NS, frames)
        options |= {"scopes": rows.scopes, "row_scope": rows.kind_M}
        return (rows.hidden_MD, self.weight, rows.targets_MS, rows.weight_MS), options, rows

    def _frame_rows(
        self, hidden_ND: Tensor, targets_NS: Tensor, weight_NS: Tensor, frames: Frames
    ) -> FrameRows:
        """A multi-scale batch as rows of the op."""
        if self.stream_embed is not None:
            frames = Frames(frames.rows_R, frames.hidden_RED + self.stream_embed)
        kind_N = self.row_scope(targets_NS, weight_NS)
        scopes = self._frame_scopes()
        return frame_rows(hidden_ND, self.places(targets_NS), weight_NS, frames, kind_N, scopes)

    def _frame_scopes(self) -> list[Any]:
        """Scopes of every content and stream of a multi-scale model, in rows of the weight."""
        # The scope of one stream of one content, in every column: one product of that width computes the kind.
        scopes = []
        for content in self.scopes if self.contents is not None else [self.scopes]:
            for s, scope in enumerate(content):
                rows = [self.rows_of(s, start, end) for start, end in scope]
                scopes.append([[(r.start, r.stop) for r in rows]] * len(content))
        return scopes

    def places(self, targets_NS: Tensor) -> Tensor:
        """Rows of the weight for ids, int64 ``[N, S]``: the ids themselves for a shared head; -1 where a stream has no
        row for its id."""
        targets_NS = targets_NS.to(torch.int64)
        if self.heads == "shared":
            return targets_NS
        columns = []
        contents = self.scopes if self.contents is not None else [self.scopes]
        for s, target_N in enumerate(targets_NS.unbind(1)):
            place_N = torch.full_like(target_N, -1)
            for start, end in {interval for scopes in contents for interval in scopes[s]}:
                first = self.rows_of(s, start, end).start
                place_N = torch.where(
                    (target_N >= start) & (target_N < end), target_N - start + first, place_N
                )
            columns.append(place_N)
        return torch.stack(columns, dim=1)

    def rows_of(self, stream: int, start: int, end: int) -> slice:
        """The weight's rows that give the logits of ids start to end - 1 in a stream.

        Raises:
            ConfigError: the stream has no logits for these ids.
        """
        rows = head_rows(self.scopes, stream, start, end) if self.heads == "separate" else slice(start, end)
        if rows is None:
            raise ConfigError(
                f"stream {stream} has no output rows for ids {start} to {end - 1}: with separate heads a stream has "
                f"those of its scope ({self.settings.scope!r})."
            )
        return rows
