"""multistream_loss on the CPU, chunk by chunk.

Per group of streams that one product serves: ``Z = h Wᵀ`` of a chunk of rows into a buffer that all chunks share, the
row kernel, which turns Z into the streams' summed logit gradients G in place, then ``dH = G W`` and ``dW += Gᵀ h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from speechlm_ext.ops._memory import empty_in_huge_pages, lazy_zeros
from speechlm_ext.ops._native import native
from speechlm_ext.ops.reference.multistream_loss import Interval, LossOptions, LossResult, merge_intervals

#: Bytes of logits in a chunk, but at least _MIN_ROWS rows: with fewer, the products wait for memory.
_CHUNK_BYTES = 64 << 20
_MIN_ROWS = 512
#: Rows of the weight that are widened to float64 at a time.
_WIDE_ROWS = 2048

Scopes = tuple[tuple[Interval, ...], ...]


@dataclass(frozen=True)
class Group:
    """Streams that one product serves."""

    root: tuple[Interval, ...]
    """The ids whose logits are computed, one interval after the other."""
    streams: tuple[int, ...]
    slices: tuple[tuple[tuple[int, int, int], ...], ...]
    """Per stream, its scope as ``(first id, first column, count)``."""

    @property
    def columns(self) -> int:
        return sum(end - start for start, end in self.root)


@lru_cache(maxsize=64)
def group_streams(scopes: Scopes) -> tuple[Group, ...]:
    """Stream 0 and all streams whose scopes lie inside its own share a product; the others share one.

    Streams after the first are live in nearly the same rows (a frame has all its codes), stream 0 in others too (text).
    """
    first = [s for s, scope in enumerate(scopes) if _covers(scopes[0], scope)]
    rest = [s for s in range(len(scopes)) if s not in first]
    groups = []
    for members in (first, rest):
        if not members:
            continue
        root = merge_intervals([interval for s in members for interval in scopes[s]])
        slices = tuple(tuple(_place(root, interval) for interval in scopes[s]) for s in members)
        groups.append(Group(root, tuple(members), slices))
    return tuple(groups)


def _covers(outer: Sequence[Interval], inner: Sequence[Interval]) -> bool:
    return all(any(a <= start and end <= b for a, b in outer) for start, end in inner)


def _place(root: Sequence[Interval], interval: Interval) -> tuple[int, int, int]:
    start, end = interval
    base = 0
    for a, b in root:
        if a <= start and end <= b:
            return start, base + start - a, end - start
        base += b - a
    raise AssertionError(f"{interval} is not in {root}")


def native_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    live: Tensor,
    coef_loss: Tensor,
    coef_nll: Tensor | None,
    scopes: Scopes,
    stream_embed: Tensor | None,
    bias: Tensor | None,
    options: LossOptions,
    want_grad: bool,
    want_tokens: bool,
) -> LossResult:
    """As `speechlm_ext.ops.reference.multistream_loss.loss_pass`, with the row kernel."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    N, S = targets.shape
    targets, live = targets.contiguous(), live.contiguous()
    coef_loss = coef_loss.to(dtype).contiguous()
    coef_nll = None if coef_nll is None else coef_nll.to(dtype).contiguous()
    # Sums run in float32 (float64 for float64 input) however narrow the inputs are.
    weight_f = weight.to(dtype)
    embed_f = None if stream_embed is None else stream_embed.to(dtype)
    bias_f = None if bias is None else bias.to(dtype)
    stream_loss = torch.zeros(S, dtype=torch.float64)
    result = LossResult(
        stream_loss,
        torch.zeros(N, S, dtype=dtype) if want_tokens else None,
        torch.zeros(S, dtype=torch.int64),
    )
    if want_grad:
        result.grad_hidden = torch.zeros(hidden.shape, dtype=dtype)
        result.grad_weight = lazy_zeros(weight.shape[0], weight.shape[1], dtype)
        result.grad_embed = None if embed_f is None else torch.zeros_like(embed_f)
        result.grad_bias = None if bias_f is None else torch.zeros_like(bias_f)
    wants_sums = want_grad and (embed_f is not None or bias_f is not None)
    written: list[Interval] = []
    for group in group_streams(scopes):
        rows = live[:, group.streams].any(dim=1).nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        C, k = group.columns, len(group.streams)
        chunk = max(_MIN_ROWS, _CHUNK_BYTES // (C * dtype.itemsize))
        buffer = empty_in_huge_pages(min(chunk, rows.numel()), C, dtype)
        offsets = _stream_bias(group, weight_f, embed_f, bias_f)
        streams = [(s, wants_sums, slices) for s, slices in zip(group.streams, group.slices, strict=True)]
        num_sums = sum(count for slices in group.slices for _, _, count in slices) if wants_sums else 0
        column_sums = torch.zeros(num_sums, dtype=dtype) if wants_sums else None
        group_loss = torch.zeros(k, dtype=torch.float64)
        group_correct = torch.zeros(k, dtype=torch.int64)
        fresh = not any(a < d and c < b for a, b in group.root for c, d in written)
        written += group.root
        first_group = not written[len(group.root) :]
        for chunk_rows in rows.split(chunk):
            everyone = chunk_rows.numel() == N
            h = (hidden if everyone else hidden[chunk_rows]).to(dtype).contiguous()
            z = buffer[: h.shape[0]]
            for (a, b), columns in _blocks(group, z):
                torch.mm(h, weight_f[a:b].T, out=columns)
            native.multistream_loss_rows(
                z,
                chunk_rows,
                targets,
                live,
                coef_loss,
                coef_nll,
                offsets,
                streams,
                options.z_loss,
                options.label_smoothing,
                options.softcap or 0.0,
                want_grad,
                result.token_nll,
                group_loss,
                group_correct,
                column_sums,
                torch.get_num_threads(),
            )
            if not want_grad:
                continue
            grad_h = None
            for (a, b), columns in _blocks(group, z):
                part = weight_f[a:b]
                grad_h = columns @ part if grad_h is None else grad_h.addmm_(columns, part)
                result.grad_weight[a:b].addmm_(columns.T, h, beta=0 if fresh else 1)  # type: ignore[index]
            fresh = False
            if first_group:
                result.grad_hidden[chunk_rows] = grad_h  # type: ignore[index]
            else:
                result.grad_hidden.index_add_(0, chunk_rows, grad_h)  # type: ignore[union-attr,arg-type]
        index = torch.tensor(group.streams)
        result.stream_loss.index_add_(0, index, group_loss)
        result.stream_correct.index_add_(0, index, group_correct)
        if column_sums is not None:
            _add_rank_one_terms(result, group, column_sums, weight_f, embed_f)
    result.stream_loss = result.stream_loss.to(dtype)
    return result


def _blocks(group: Group, matrix: Tensor) -> list[tuple[Interval, Tensor]]:
    """Each interval of ids with its columns of ``matrix``."""
    out, base = [], 0
    for start, end in group.root:
        out.append(((start, end), matrix[:, base : base + end - start]))
        base += end - start
    return out


def _stream_bias(group: Group, weight: Tensor, embed: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """``[k, C]``: what each stream adds to the shared logits.

    Summed in float64: all rows share this row of numbers, so its error would not average out over them.
    """
    if embed is None and bias is None:
        return None
    out = weight.new_zeros(len(group.streams), group.columns)
    wide = None if embed is None else embed[list(group.streams)].double()
    for (a, b), columns in _blocks(group, out):
        for start in range(a, b, _WIDE_ROWS):
            end = min(b, start + _WIDE_ROWS)
            part = columns[:, start - a : end - a]
            total = 0.0 if bias is None else bias[start:end].double()
            part.copy_(total if wide is None else wide @ weight[start:end].double().T + total)
    return out


def _add_rank_one_terms(
    result: LossResult, group: Group, column_sums: Tensor, weight: Tensor, embed: Tensor | None
) -> None:
    """What stream embeddings and bias get, and what the embeddings add to dW."""
    sums = weight.new_zeros(len(group.streams), group.columns)
    at = 0
    for k, slices in enumerate(group.slices):
        for _, begin, count in slices:
            sums[k, begin : begin + count] = column_sums[at : at + count]
            at += count
    streams = list(group.streams)
    for (a, b), columns in _blocks(group, sums):
        if embed is not None:
            result.grad_weight[a:b].addmm_(columns.T, embed[streams])  # type: ignore[index]
            result.grad_embed[streams] += columns @ weight[a:b]  # type: ignore[index]
        if result.grad_bias is not None:
            result.grad_bias[a:b] += columns.sum(dim=0)
