"""Loss and scores of a multi-scale model: each stream of a frame has a hidden state of its own.

The op takes one hidden state per row, with the streams as columns. So every (position, stream) becomes a row: its
target is in the column of its stream, for the op's statistics, and its kind has the stream's own scope, so that every
logit computed is read. No tensor has size ``[N, S, V]``.

Axes: N packed positions, R of them with a frame, E = S - 1, S streams, D hidden, M = N + R·E rows, K kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speechlm_ext.model.frame import Frames


@dataclass(frozen=True, eq=False)
class FrameRows:
    """Arguments of the op, from :func:`frame_rows`."""

    hidden_MD: Tensor
    """The positions' own hidden states, then those of the frames' further streams with the streams' vectors in them."""
    targets_MS: Tensor
    """int64 rows of the head's weight (ids, for a shared head)."""
    weight_MS: Tensor
    kind_M: Tensor
    """int64, which of ``scopes`` each row uses."""
    scopes: list[Any]
    """K kinds of rows."""
    rows_R: Tensor

    def unroll(self, value_MS: Tensor) -> Tensor:
        """A result ``[M, S]`` of the op as ``[N, S]``; differentiable."""
        R, S = len(self.rows_R), value_MS.shape[1]
        N = len(value_MS) - R * (S - 1)
        further_RE = value_MS[N:].view(R, S - 1, S).diagonal(offset=1, dim1=1, dim2=2)
        further_NE = value_MS.new_zeros(N, S - 1).index_copy(0, self.rows_R, further_RE)
        return torch.cat((value_MS[:N, :1], further_NE), dim=1)


def frame_positions(weight_NS: Tensor) -> Tensor:
    """int64 ``[R]``: positions with a loss in streams 1 to S - 1, but at least one, of weight zero: so every rank runs
    every module, and every parameter has a gradient."""
    rows_R = (weight_NS[:, 1:] > 0).any(dim=1).nonzero().squeeze(1)
    return rows_R if len(rows_R) else rows_R.new_zeros(1)


def unrolled_kinds(kind_N: Tensor | None, rows_R: Tensor, num_rows: int, num_streams: int) -> Tensor:
    """int64 ``[M]``: the kind of each of the op's rows, from the content of each position (None: the first)."""
    kind_N = rows_R.new_zeros(num_rows) if kind_N is None else kind_N
    stream_E = torch.arange(1, num_streams, device=rows_R.device)
    return torch.cat((kind_N * num_streams, (kind_N[rows_R, None] * num_streams + stream_E).flatten()))


def frame_rows(
    hidden_ND: Tensor,
    targets_NS: Tensor,
    weight_NS: Tensor,
    frames: Frames,
    kind_N: Tensor | None,
    scopes: list[Any],
) -> FrameRows:
    """The rows of a batch for the op, from those of stream 0 and the ``frames`` with the streams' vectors in them.

    ``kind_N`` is the content of each position (None: all of the first), ``scopes`` those of every content and stream.
    """
    hidden_RED, rows_R = frames.hidden_RED, frames.rows_R
    kind_M = unrolled_kinds(kind_N, rows_R, *targets_NS.shape)
    return FrameRows(
        torch.cat((hidden_ND, hidden_RED.to(hidden_ND.dtype).flatten(0, 1))),
        unrolled(targets_NS, rows_R),
        unrolled(weight_NS, rows_R),
        kind_M,
        scopes,
        rows_R,
    )


def unrolled(value_NS: Tensor, rows_R: Tensor) -> Tensor:
    """``[M, S]``: column 0 of every position, then each further stream of a frame in a row of its own, else zero."""
    N, S = value_NS.shape
    out_MS = value_NS.new_zeros(N + len(rows_R) * (S - 1), S)
    out_MS[:N, 0] = value_NS[:, 0]
    further = out_MS[N:].view(len(rows_R), S - 1, S).diagonal(offset=1, dim1=1, dim2=2)
    further.copy_(value_NS[rows_R, 1:])
    return out_MS
