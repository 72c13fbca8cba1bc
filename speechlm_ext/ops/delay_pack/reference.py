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
    id_offsets: Sequence[int] | Sequence[Sequence[int]] | None = None,
    loss_weight: Sequence[Tensor] | None = None,
    tail: str | int = "keep",
    segment_weight: Tensor | None = None,
    prefix: Sequence[Sequence[int]] | None = None,
    suffix: Sequence[Sequence[int]] | None = None,
    prefix_weight: float = 0.0,
    suffix_weight: float = 1.0,
    groups: Sequence[int] | None = None,
    tail_ids: Sequence[int] | None = None,
    fill_weight: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(ids, labels, loss_weight, position, cu_seqlens, segment_map, stream_map)`` of `speechlm_ext.ops.delay_pack`,
    list form only, with special ids as one list per segment."""
    S, max_delay = len(delays), max(delays)
    device = segments[0].device if segments else torch.device("cpu")
    dtype = dtype or (segments[0].dtype if segments else torch.int64)
    tail_rows = tail if isinstance(tail, int) else max_delay if tail == "keep" else 0
    pads = torch.tensor(list(pad_ids), dtype=torch.int64, device=device)
    ends = torch.tensor(list(pad_ids if tail_ids is None else tail_ids), dtype=torch.int64, device=device)

    blocks = []  # ids, weights, frames of each segment
    first_frame = 0
    for i, segment in enumerate(segments):
        num_frames, width = segment.shape
        before = list(prefix[i]) if prefix is not None else []
        after = list(suffix[i]) if suffix is not None else []
        offset = torch.zeros(S, dtype=torch.int64, device=device)
        if id_offsets is not None:
            given = torch.as_tensor(id_offsets, dtype=torch.int64, device=device)
            offset = given if given.dim() == 1 else given[i]
        weight = torch.ones(segment.shape, device=device) if loss_weight is None else loss_weight[i].float()
        if segment_weight is not None:
            weight = weight * segment_weight[i, :width].float().to(device)

        frames = pads.repeat(len(before) + num_frames + len(after), 1)
        frame_weight = torch.zeros(frames.shape, device=device)
        source = torch.full(frames.shape, -1, dtype=torch.int32, device=device)
        content = slice(len(before), len(before) + num_frames)
        for at, ids, value in ((0, before, prefix_weight), (content.stop, after, suffix_weight)):
            for k, special in enumerate(ids):
                frames[at + k, 0] = special
                frame_weight[at + k, 0] = value
        frames[content, :width] = segment.long() + offset[:width]
        frame_weight[content, :width] = weight
        source[content, :width] = torch.arange(first_frame, first_frame + num_frames, device=device).int()[
            :, None
        ]
        first_frame += num_frames

        length = len(frames)
        ids = pads.repeat(length + max_delay, 1)
        delayed_weight = torch.zeros(ids.shape, device=device)
        delayed_source = torch.full(ids.shape, -1, dtype=torch.int32, device=device)
        for s, d in enumerate(delays):
            if s < width:
                ids[d + length :, s] = ends[s]
                delayed_weight[:, s] = fill_weight
            ids[d : d + length, s] = frames[:, s]
            delayed_weight[d : d + length, s] = frame_weight[:, s]
            delayed_source[d : d + length, s] = source[:, s]
        rows = length + tail_rows
        blocks.append((ids[:rows].to(dtype), delayed_weight[:rows], delayed_source[:rows]))

    borders = list(range(len(segments) + 1)) if groups is None else list(groups)
    empty = (
        torch.empty(0, S, dtype=dtype, device=device),
        torch.empty(0, S, device=device),
        torch.empty(0, S, dtype=torch.int32, device=device),
    )
    ids, weights, sources = (torch.cat([e, *(b[k] for b in blocks)]) for k, e in enumerate(empty))
    labels, shifted, positions, lengths = [], [], [], []
    row = 0
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        rows = sum(len(b[0]) for b in blocks[first:last])
        span = slice(row + 1, row + rows)
        nothing = torch.zeros(1, S, device=device)
        labels.append(torch.cat([ids[span], ends[None].to(dtype)])[:rows])
        shifted.append(torch.cat([weights[span], nothing])[:rows])
        positions.append(torch.arange(rows, dtype=torch.int32, device=device))
        lengths.append(rows)
        row += rows
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    segment_map = torch.cat(
        [torch.empty(0, dtype=torch.int32, device=device)]
        + [torch.full((len(b[0]),), i, dtype=torch.int32, device=device) for i, b in enumerate(blocks)]
    )
    return (
        ids,
        torch.cat([empty[0], *labels]),
        torch.cat([empty[1], *shifted]),
        torch.cat([segment_map[:0], *positions]),
        cu_seqlens,
        segment_map,
        sources,
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
