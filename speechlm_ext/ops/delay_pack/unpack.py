"""delay_unpack: the inverse of `delay_pack`, for whole blocks and for rows that arrive a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import ID_DTYPES, OpError, describe, int_list
from speechlm_ext.ops.delay_pack.arguments import MAX_STREAMS, check_segment, read_offsets


def delay_unpack(ids: Tensor, cu_seqlens: Tensor | Sequence[int], *, delays: Sequence[int]) -> list[Tensor]:
    """Undo the delays of a packed block: the exact inverse of `delay_pack`.

    Args:
        ids: int32 or int64 ``[N, S]`` block, e.g. ``PackedBatch.ids`` or generated rows.
        cu_seqlens: ``[n + 1]``, row at which each segment starts, and N at the end. A CUDA tensor is copied to the
            host, which synchronizes.
        delays: the delays that the block was packed with, ``S`` values.

    Returns:
        One ``[rows_i - max(delays), S]`` tensor per sequence (no frames if it has fewer rows): views of one flat
        tensor. For a block packed with ``tail="keep"`` these are the segments with their id offsets and special ids,
        the segments of a group as one; with ``tail="trim"`` without their last ``max(delays)`` frames.

    Raises:
        OpError: (a ValueError) a wrong dtype, rank or number of streams; ``cu_seqlens`` that do not start at 0, fall,
            or do not end at N; a CUDA stream that is capturing a graph.
    """
    delays = int_list(delays, "delay_unpack: delays")
    if len(delays) == 0:
        raise OpError("delay_unpack: delays must have at least one value")
    check_segment("delay_unpack: ids", ids, len(delays))
    borders = read_offsets(cu_seqlens, "delay_unpack: cu_seqlens")
    if min(delays) < 0:
        raise OpError(f"delay_unpack: delays must be 0 or more rows; got {delays}")
    lengths = (borders.diff() - max(delays)).clamp_(min=0).tolist()
    flat = torch.ops.speechlm_ext.delay_unpack(ids, borders, delays, sum(lengths))
    return list(flat.split(lengths)) if lengths else []


class DelayUnpacker:
    """Streaming `delay_unpack`: a frame is returned once its last stream has arrived, ``max(delays)`` rows after its
    first.

    Example:
        >>> unpacker = DelayUnpacker([0, 1])
        >>> [unpacker.push(torch.tensor([row])).tolist() for row in ([1, 0], [2, 7], [3, 8])]
        [[], [[1, 7]], [[2, 8]]]
    """

    def __init__(self, delays: Sequence[int]) -> None:
        """An unpacker before its first row.

        Args:
            delays: the delays that the rows were packed with, ``S`` values.

        Raises:
            OpError: (a ValueError) no delays, too many, or negative ones.
        """
        self.delays = int_list(delays, "DelayUnpacker: delays")
        if not 1 <= len(self.delays) <= MAX_STREAMS or min(self.delays) < 0:
            raise OpError(
                f"DelayUnpacker: delays must be 0 or more rows for 1 to {MAX_STREAMS} streams; got {self.delays}"
            )
        self._pending: Tensor | None = None

    def push(self, rows: Tensor) -> Tensor:
        """The frames that the next rows complete.

        Args:
            rows: int32 or int64 ``[n, S]``, or ``[B, n, S]`` for B sequences in step; n may be 0.

        Returns:
            ``[m, S]`` or ``[B, m, S]`` frames in order. Joined over all calls they equal `delay_unpack` of all rows.

        Raises:
            OpError: (a ValueError) a wrong dtype, rank or number of streams; rows of another batch size, dtype or
                device than those before (call `reset` first).
        """
        S = len(self.delays)
        if not (
            isinstance(rows, Tensor)
            and rows.dim() in (2, 3)
            and rows.dtype in ID_DTYPES
            and rows.shape[-1] == S
        ):
            raise OpError(
                f"DelayUnpacker: rows must be int32 or int64 [n, {S}] or [B, n, {S}]; got {describe(rows)}"
            )
        pending = self._pending
        if pending is not None:
            if (rows.shape[:-2], rows.dtype, rows.device) != (
                pending.shape[:-2],
                pending.dtype,
                pending.device,
            ):
                raise OpError(
                    f"DelayUnpacker: rows is {describe(rows)}, but the rows before were like {describe(pending)}; "
                    "call reset() before other sequences"
                )
            rows = torch.cat([pending, rows], dim=-2)
        length, max_delay = rows.shape[-2], max(self.delays)
        complete = max(0, length - max_delay)
        self._pending = rows[..., complete:, :].clone()
        sequences = rows.shape[0] if rows.dim() == 3 else 1
        borders = torch.arange(sequences + 1, device="cpu") * length
        flat = torch.ops.speechlm_ext.delay_unpack(
            rows.reshape(-1, S), borders, self.delays, sequences * complete
        )
        return flat.view(*rows.shape[:-2], complete, S)

    def reset(self) -> None:
        """Discard all pending rows: the next rows start other sequences."""
        self._pending = None
