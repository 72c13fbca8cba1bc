"""multistream_loss, chunk by chunk.

Per group of streams that one product serves: ``Z = h Wᵀ`` of a chunk of rows into a buffer that all chunks share, the
row kernel, which turns Z into the streams' summed logit gradients G in place, then ``dH = G W`` and ``dW += Gᵀ h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.matmul import (
    add_hidden_gradient,
    add_weight_gradient,
    put_logits,
    run,
    weight_tiles,
)
from speechlm_ext.ops.common.memory import empty_in_huge_pages
from speechlm_ext.ops.multistream_loss.row_kernel import loss_rows
from speechlm_ext.ops.multistream_loss.scopes import (
    Group,
    Interval,
    Scopes,
    ScopeSets,
    as_index,
    group_all,
    group_streams,
)
from speechlm_ext.ops.multistream_loss.types import LossOptions, LossResult

#: Bytes of logits in a chunk, but at least _MIN_ROWS rows: with fewer, the products wait for memory.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 384 << 20}
_MIN_ROWS = 512
#: Rows of the weight that are widened to float64 at a time: what they take is held beside the logits.
_WIDE_ROWS, _WIDE_ROWS_GPU = 256, 8192
#: All streams share one product where that costs at most this much more than two.
_ONE_PRODUCT = 1.02


def native_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    live: Tensor,
    coef_loss: Tensor,
    coef_nll: Tensor | None,
    row_scope: Tensor | None,
    sets: ScopeSets,
    stream_embed: Tensor | None,
    bias: Tensor | None,
    options: LossOptions,
    want_grad: bool,
    want_tokens: bool,
    want_entropy: bool,
    chunk_bytes: int | None = None,
    wants: Sequence[bool] = (True,) * 4,
) -> LossResult:
    """As `speechlm_ext.ops.multistream_loss.reference.loss_pass`, with the row kernel.

    ``chunk_bytes``: bytes of logits in a chunk. ``wants``: which gradients of hidden, weight, stream_embed and bias.
    """
    work = _Pass(
        hidden, weight, targets, coef_loss, coef_nll, stream_embed, bias, options, want_grad, want_tokens,
        want_entropy, chunk_bytes, wants,
    )  # fmt: skip
    for kind, scopes in enumerate(sets):
        live_here = live if row_scope is None else live & (row_scope == kind)[:, None]
        # The kinds' rows are others, unless all kinds run over all rows.
        apart = row_scope is not None and not capturing(live)
        work.run_kind(scopes, live_here.contiguous(), first=kind == 0 or apart)
    return work.finish()


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: then nothing may wait for the device, so no row is left out."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Pass:
    """One call: its inputs in the dtype of the sums, and the results so far."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        coef_loss: Tensor,
        coef_nll: Tensor | None,
        stream_embed: Tensor | None,
        bias: Tensor | None,
        options: LossOptions,
        want_grad: bool,
        want_tokens: bool,
        want_entropy: bool,
        chunk_bytes: int | None,
        wants: Sequence[bool],
    ) -> None:
        # Sums run in float32 (float64 for float64 input) however narrow the inputs are.
        self.dtype = _sum_dtype(hidden.dtype)
        # On a GPU the products of bfloat16 tensors run in bfloat16, and their sums in float32. Not those of float16, in
        # which the logits' gradients, that nobody has scaled up yet, would be lost.
        narrow = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.product_dtype = hidden.dtype if narrow else self.dtype
        self.hidden, self.targets = hidden.detach(), targets.contiguous()
        self.weight = weight.detach().to(self.product_dtype)
        self.embed = None if stream_embed is None else stream_embed.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.coef_loss = coef_loss.to(self.dtype).contiguous()
        self.coef_nll = None if coef_nll is None else coef_nll.to(self.dtype).contiguous()
        self.options, self.want_grad = options, want_grad
        want_hidden, want_weight, want_embed, want_bias = wants
        self.want_sums = want_grad and (
            (self.embed is not None and (want_weight or want_embed)) or (self.bias is not None and want_bias)
        )
        self.chunk_bytes = chunk_bytes or _CHUNK_BYTES[hidden.device.type]
        N, S = targets.shape
        new = hidden.new_zeros
        self.result = LossResult(
            new(S, dtype=torch.float64),
            new(S, dtype=torch.int64),
            new(N, S, dtype=self.dtype) if want_tokens else None,
            new(N, S, dtype=self.dtype) if want_entropy else None,
        )
        if want_grad and want_hidden:
            self.result.grad_hidden = new(hidden.shape, dtype=self.dtype)
        if want_grad and want_weight:
            self.result.grad_weight = empty_in_huge_pages(
                weight.shape[0], weight.shape[1], self.dtype, weight.device
            )
        if want_grad and want_embed and stream_embed is not None:
            self.result.grad_embed = new(stream_embed.shape, dtype=self.dtype)
        if want_grad and want_bias and bias is not None:
            self.result.grad_bias = new(bias.shape, dtype=self.dtype)
        #: Rows of grad_weight that have been written, (start, end); the others hold whatever memory holds.
        self.written: list[tuple[int, int]] = []

    def finish(self) -> LossResult:
        """The results, with zeros in all that no row has reached."""
        result = self.result
        result.stream_loss = result.stream_loss.to(self.dtype)
        if result.grad_weight is not None:
            self._zero_unwritten(0, result.grad_weight.shape[0])
        return result

    def _zero_unwritten(self, start: int, end: int) -> None:
        """Writes zeros to those of grad_weight's rows start to end that hold nothing yet."""
        for a, b in sorted(self.written):
            if start < min(a, end):
                self.result.grad_weight[start : min(a, end)] = 0  # type: ignore[index]
            start = max(start, b)
        if start < end:
            self.result.grad_weight[start:end] = 0  # type: ignore[index]

    def _claim(self, group: Group) -> list[bool]:
        """For each interval of the root, whether nothing has been written to its rows of grad_weight yet. Where
        something has, the rest becomes zero, so that all can be added to."""
        fresh = []
        for interval in group.root:
            start, end = interval.row, interval.row + interval.num_ids
            fresh.append(not any(a < end and start < b for a, b in self.written))
            if not fresh[-1]:
                self._zero_unwritten(start, end)
        self.written += [(i.row, i.row + i.num_ids) for i in group.root]
        return fresh

    def run_kind(self, scopes: Scopes, live: Tensor, first: bool) -> None:
        """All rows that ``live`` has, whose streams run over ``scopes``; ``first``: no kind before had these rows."""
        for number, (group, rows) in enumerate(_plan(scopes, live)):
            if rows.numel():
                self._run_group(group, rows, live, first and number == 0)

    def _run_group(self, group: Group, rows: Tensor, live: Tensor, first: bool) -> None:
        dtype, C = self.product_dtype, group.columns
        chunk = max(_MIN_ROWS, self.chunk_bytes // (C * dtype.itemsize))
        buffer = empty_in_huge_pages(min(chunk, rows.numel()), C, dtype, rows.device)
        offsets = _stream_bias(group, self.weight, self.embed, self.bias)
        streams = [(s, self.want_sums, slices) for s, slices in zip(group.streams, group.slices, strict=True)]
        num_sums = sum(count for slices in group.slices for _, _, count in slices)
        column_sums = self.hidden.new_zeros(num_sums, dtype=self.dtype) if self.want_sums else None
        loss = self.hidden.new_zeros(len(streams), dtype=torch.float64)
        correct = torch.zeros_like(loss, dtype=torch.int64)
        fresh = self._claim(group) if self.result.grad_weight is not None else None
        everyone = rows.numel() == self.hidden.shape[0]
        for start in range(0, rows.numel(), chunk):
            chunk_rows = rows[start : start + chunk]
            span = slice(start, start + chunk)
            h = (self.hidden[span] if everyone else self.hidden[chunk_rows]).to(dtype).contiguous()
            z = buffer[: h.shape[0]]
            for interval, columns in _blocks(group, z):
                put_logits(columns, h, _rows(self.weight, interval))
            loss_rows(
                z, chunk_rows, self.targets, live, self.coef_loss, self.coef_nll, offsets, streams, self.options,
                self.want_grad, self.result.token_nll, self.result.token_entropy, loss, correct, column_sums,
            )  # fmt: skip
            if self.result.grad_weight is not None:
                self._add_grad_weight(group, z, h, fresh if start == 0 else None)
            if self.result.grad_hidden is not None:
                self._put_grad_hidden(group, z, span if everyone else chunk_rows, first)
        del buffer, z  # before more is taken
        self.result.stream_loss[group.index] += loss
        self.result.stream_correct[group.index] += correct
        if column_sums is not None:
            self._add_rank_one_terms(group, column_sums)

    def _add_grad_weight(self, group: Group, grad: Tensor, h: Tensor, fresh: Sequence[bool] | None) -> None:
        """``dW += Gᵀ h``; ``fresh`` says for each interval whether nothing has been written there yet."""
        for number, (interval, columns) in enumerate(_blocks(group, grad)):
            keep = not (fresh and fresh[number])
            add_weight_gradient(_rows(self.result.grad_weight, interval), columns, h, keep)

    def _put_grad_hidden(self, group: Group, grad: Tensor, rows: slice | Tensor, first: bool) -> None:
        """``dH = G W`` into its rows; ``first``: nothing has been written there yet."""
        whole = self.result.grad_hidden
        in_place = isinstance(rows, slice)
        out = whole[rows] if in_place else whole.new_empty(grad.shape[0], whole.shape[1])  # type: ignore[union-attr,index]
        keep = in_place and not first
        for interval, columns in _blocks(group, grad):
            add_hidden_gradient(out, columns, _rows(self.weight, interval), keep)
            keep = True
        if in_place:
            return
        if first:
            whole[rows] = out  # type: ignore[index]
        else:
            whole.index_add_(0, rows, out)  # type: ignore[union-attr,arg-type]

    def _add_rank_one_terms(self, group: Group, column_sums: Tensor) -> None:
        """What stream embeddings and bias get, and what the embeddings add to dW."""
        sums = column_sums.new_zeros(len(group.streams), group.columns)
        at = 0
        for k, slices in enumerate(group.slices):
            for _, begin, count in slices:
                sums[k, begin : begin + count] = column_sums[at : at + count]
                at += count
        grad_embed = sums.new_zeros(len(group.streams), self.hidden.shape[1])
        for interval, columns in _blocks(group, sums):
            if self.embed is not None and self.result.grad_weight is not None:
                add_weight_gradient(
                    _rows(self.result.grad_weight, interval), columns, self.embed[group.index], True
                )
            if self.result.grad_embed is not None:
                add_hidden_gradient(grad_embed, columns, _rows(self.weight, interval), True)
            if self.result.grad_bias is not None:
                self.result.grad_bias[interval.row : interval.row + interval.num_ids] += columns.sum(dim=0)
        if self.result.grad_embed is not None:
            self.result.grad_embed[group.index] += grad_embed


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plan(scopes: Scopes, live: Tensor) -> list[tuple[Group, Tensor]]:
    """Groups of streams, and the rows where any of them is live."""
    groups = [(group, _rows_with(live[:, group.index])) for group in group_streams(scopes)]
    if len(groups) == 2:
        whole = group_all(scopes)
        rows = _rows_with(live)
        apart = sum(len(part) * group.columns for group, part in groups)
        if len(rows) * whole.columns <= _ONE_PRODUCT * apart:
            return [(whole, rows)]
    return groups


def _rows_with(live: Tensor) -> Tensor:
    """Rows with a live target. On a GPU their number is waited for: the products' sizes depend on it."""
    if capturing(live):
        return torch.arange(live.shape[0], device=live.device)
    return live.any(dim=1).nonzero().squeeze(1)


def _rows(matrix: Tensor | None, interval: Interval) -> Tensor:
    return matrix[interval.row : interval.row + interval.num_ids]  # type: ignore[index]


def _blocks(group: Group, matrix: Tensor) -> list[tuple[Interval, Tensor]]:
    """Each interval of the root with its columns of ``matrix``."""
    return [
        (interval, matrix[:, begin : begin + interval.num_ids])
        for interval, begin in zip(group.root, group.begins, strict=True)
    ]


def _stream_bias(group: Group, weight: Tensor, embed: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """``[k, C]``: what each stream adds to the shared logits, over its scope; elsewhere nobody looks.

    Summed in float64: all rows share this row of numbers, so its error would not average out over them.
    """
    if embed is None and bias is None:
        return None
    out = torch.empty(len(group.streams), group.columns, dtype=_sum_dtype(weight.dtype), device=weight.device)
    members: dict[tuple[int, int], list[int]] = {}
    for k, slices in enumerate(group.slices):
        for _, begin, count in slices:
            members.setdefault((begin, count), []).append(k)
    for (begin, count), ks in members.items():
        index = as_index(ks)
        vectors = None if embed is None else embed[as_index([group.streams[k] for k in ks])].double()
        if bias is None and weight.device.type == "cpu" and not vectors.any():  # type: ignore[union-attr]
            out[index, begin : begin + count] = 0
            continue
        row = group.row_of(begin)

        def add(tile: slice, index=index, begin=begin, row=row, vectors=vectors) -> None:  # type: ignore[no-untyped-def]
            ids = slice(row + tile.start, row + tile.stop)
            total = 0.0 if bias is None else bias[ids].double()
            total = total if vectors is None else vectors @ weight[ids].double().T + total
            out[index, begin + tile.start : begin + tile.stop] = total.to(out.dtype)  # type: ignore[union-attr]

        on_cpu = weight.device.type == "cpu"
        tasks = [partial(add, tile) for tile in weight_tiles(count, _WIDE_ROWS if on_cpu else _WIDE_ROWS_GPU)]
        if on_cpu:
            run(tasks, count * len(ks) * weight.shape[1])
        else:
            for task in tasks:
                task()
    return out
