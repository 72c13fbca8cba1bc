"""The head for decoding: logits of the ids that may be sampled, for all streams at once.

``logits_s = h Wᵀ + (e_s Wᵀ + b)``: the second part is the same for every row and is computed once; the first is one
product for all streams, because adjacent ids are adjacent rows of the weight. No weight is copied.

Axes: B rows, D hidden, S streams, C columns of all streams side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.model.head import MultiStreamHead
from speechlm_ext.ops.decode_layer import decode_linear


class DecodeHead:
    """Logits over chosen id ranges.

    Args:
        head: the model's.
        ranges: per stream the id ranges ``(start, end)``, ascending; none for a stream that is not sampled.
        join: serve neighbouring streams with one product; not where their hidden states differ.

    Attributes:
        ids: per stream int64 ``[V_s]``, the id of each column.
        runs: ``(first column, first row of the weight, columns)`` of each product.
        streams: the first stream that each product serves; without ``join`` the only one.

    Raises:
        ConfigError: a stream has no logits for some ids; see :meth:`MultiStreamHead.rows_of`.
    """

    @torch.no_grad()
    def __init__(
        self, head: MultiStreamHead, ranges: Sequence[Sequence[tuple[int, int]]], join: bool = True
    ) -> None:
        self.head, device = head, head.weight.device
        self.ids = [
            torch.cat(
                [torch.arange(0, device=device), *(torch.arange(a, b, device=device) for a, b in parts)]
            )
            for parts in ranges
        ]
        self.runs: list[tuple[int, int, int]] = []
        self.streams: list[int] = []
        parts, column = [], 0
        self._spans: list[list[tuple[int, int]]] = [list(stream) for stream in ranges]
        for s, stream in enumerate(ranges):
            for start, end in stream:
                rows = head.rows_of(s, start, end)
                bias = head.weight.new_zeros(end - start) if head.bias is None else head.bias[rows]
                if s > 0 and head.stream_embed is not None:
                    bias = bias + head.weight[rows] @ head.stream_embed[s - 1]
                parts.append(bias)
                self._add(s, column, rows.start, end - start, joins=join and start == stream[0][0])
                column += end - start
        self.num_columns = column
        self.bias_C = torch.cat([head.weight.new_zeros(0), *parts]).detach()
        self._logits: Tensor | None = None

    def reserve(self, num_rows: int) -> None:
        """Allocate logits of ``num_rows`` rows; calls up to that size keep the address, as captured graphs need."""
        # Zeros: columns that are not computed may be read and must be finite.
        self._logits = self.head.weight.new_zeros(num_rows, self.num_columns)

    def used_by(self, ranges: Sequence[Sequence[tuple[int, int]]]) -> list[bool]:
        """Which of ``runs`` contain columns of these id ranges (per stream, each inside one of the head's)."""
        columns = []
        column = 0
        for s, stream in enumerate(self._spans):
            for start, end in stream:
                columns += [
                    (column + a - start, column + b - start) for a, b in ranges[s] if start <= a < b <= end
                ]
                column += end - start
        return [any(a < first + count and b > first for a, b in columns) for first, _, count in self.runs]

    def _add(self, stream: int, column: int, row: int, count: int, joins: bool) -> None:
        # Ranges of one stream belong to several modalities and are often not needed together.
        if joins and self.runs and self.runs[-1][1] + self.runs[-1][2] == row:
            column, row, before = self.runs.pop()
            stream = self.streams.pop()
            count += before
        self.runs.append((column, row, count))
        self.streams.append(stream)

    @torch.no_grad()
    def __call__(self, hidden_BD: Tensor, used: Sequence[bool] | None = None) -> Tensor:
        """Logits ``[B, C]`` in the weight's dtype, in memory that the next call overwrites.

        ``used``: which of ``runs`` to compute; columns of the others are undefined.
        """
        B, weight = hidden_BD.shape[0], self.head.weight
        if self._logits is None or self._logits.shape[0] < B or self._logits.dtype != weight.dtype:
            self.reserve(B)
            assert self._logits is not None
        out_BC, cap = self._logits[:B], self.head.settings.softcap
        for number, (column, row, count) in enumerate(self.runs):
            if used is not None and not used[number]:
                continue
            into = out_BC[:, column : column + count]
            bias = self.bias_C[column : column + count]
            if into.is_cuda:
                torch.addmm(bias, hidden_BD, weight[row : row + count].T, out=into)
            else:  # a row's bits do not depend on the other rows
                into.copy_(decode_linear(hidden_BD, weight[row : row + count], bias))
            if cap is not None:
                into.div_(cap).tanh_().mul_(cap)
        return out_BC
