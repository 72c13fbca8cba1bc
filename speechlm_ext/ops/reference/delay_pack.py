"""delay_pack and delay_unpack in plain torch, segment by segment and stream by stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def delay_pack(
    segments: Sequence[Tensor],
    *,
    delays: Sequence[int],
    pad_ids: Sequence[int],
    id_offsets: Sequence[int] | None = None,
    loss_weight: Sequence[Tensor] | None = None,
    tail: str = "keep",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(ids, labels, loss_weight, position, cu_seqlens)`` of `speechlm_ext.ops.delay_pack`, list form only."""
    num_streams = len(delays)
    max_delay = max(delays)
    offsets = id_offsets if id_offsets is not None else [0] * num_streams
    device = segments[0].device if segments else torch.device("cpu")
    dtype = segments[0].dtype if segments else torch.int64
    pads = torch.tensor(list(pad_ids), dtype=dtype, device=device)

    blocks, labels, weights, positions, lengths = [], [], [], [], []
    for i, segment in enumerate(segments):
        num_frames = segment.shape[0]
        weight = torch.ones(segment.shape, device=device) if loss_weight is None else loss_weight[i].float()
        rows = num_frames + max_delay
        ids = pads.repeat(rows, 1)
        delayed_weight = torch.zeros(rows, num_streams, device=device)
        for s in range(num_streams):
            ids[delays[s] : delays[s] + num_frames, s] = segment[:, s] + offsets[s]
            delayed_weight[delays[s] : delays[s] + num_frames, s] = weight[:, s]
        if tail == "trim":
            rows = num_frames
            ids, delayed_weight = ids[:rows], delayed_weight[:rows]
        zero = torch.zeros(1, num_streams, device=device)
        blocks.append(ids)
        labels.append(torch.cat([ids[1:], pads[None]])[:rows])
        weights.append(torch.cat([delayed_weight[1:], zero])[:rows])
        positions.append(torch.arange(rows, dtype=torch.int32, device=device))
        lengths.append(rows)

    cu_seqlens = torch.zeros(len(segments) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    if not segments:
        empty = torch.empty(0, num_streams, dtype=dtype)
        return empty, empty.clone(), empty.float(), torch.empty(0, dtype=torch.int32), cu_seqlens
    return (
        torch.cat(blocks),
        torch.cat(labels),
        torch.cat(weights),
        torch.cat(positions),
        cu_seqlens.to(device),
    )


def delay_unpack(ids: Tensor, cu_seqlens: Tensor, *, delays: Sequence[int]) -> list[Tensor]:
    """The segments of a packed block, each ``rows - max(delays)`` frames long (at least 0)."""
    borders = cu_seqlens.tolist()
    segments = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        num_frames = max(0, end - start - max(delays))
        columns = [ids[start + d : start + d + num_frames, s] for s, d in enumerate(delays)]
        segments.append(torch.stack(columns, dim=1))
    return segments
