"""multistream_loss, chunk by chunk.

Per group of streams that one product serves: ``Z = h Wᵀ`` of a chunk of rows into a buffer that all chunks share, the
row kernel, which replaces Z by the streams' summed logit gradients G, then ``dH = G W`` and ``dW += Gᵀ h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from speechlm_ext.ops.common.matmul import (
    add_hidden_gradient,
    add_weight_gradient,
    matmul_into,
    run,
    weight_tiles,
)
from speechlm_ext.ops.common.memory import empty_in_huge_pages
from speechlm_ext.ops.multistream_loss.row_kernel import RowOutputs, loss_rows
from speechlm_ext.ops.multistream_loss.scopes import (
    Group,
    Interval,
    Scopes,
    as_index,
    group_all,
    group_streams,
)
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossResult, LossWants, sum_dtype

#: Bytes of logits in a chunk, but at least MIN_ROWS rows: with fewer, the products wait for memory.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 384 << 20}
MIN_ROWS = 512
#: Rows of the weight that are widened to float64 at a time, in memory besides the logits.
_WIDE_ROWS, _WIDE_ROWS_GPU = 256, 8192
#: All streams share one product if that costs at most this factor of two products.
_ONE_PRODUCT = 1.02


def loss_pass(inputs: LossInputs, wants: LossWants, chunk_bytes: int = 0) -> LossResult:
    """Results of the pass; ``chunk_bytes``: bytes of logits in a chunk, 0 for the device's default."""
    work = _Pass(inputs, wants, chunk_bytes)
    for kind, scopes in enumerate(inputs.sets):
        live = inputs.live_of(kind).contiguous()
        # Rows of two kinds are disjoint, except under capture, where every kind computes all rows.
        work.run_kind(scopes, live, accumulate=kind > 0 and capturing(live))
    return work.finish()


def capturing(tensor: Tensor) -> bool:
    """True while a CUDA graph is being captured: nothing may synchronize, so no row can be left out."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _WeightGradient:
    """dW in memory that is not zeroed first: the first product of each row overwrites, later ones add."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.values = empty_in_huge_pages(weight.shape[0], weight.shape[1], dtype, weight.device)
        #: Written rows, (start, end); the others are uninitialized.
        self._written: list[tuple[int, int]] = []

    def zero_unwritten(self, start: int, end: int) -> None:
        """Write zeros to the unwritten rows among start to end - 1."""
        for a, b in sorted(self._written):
            if start < min(a, end):
                self.values[start : min(a, end)] = 0
            start = max(start, b)
        if start < end:
            self.values[start:end] = 0

    def reserve(self, intervals: Sequence[Interval]) -> list[bool]:
        """Per interval, whether the next product adds to its rows; where it does, unwritten rows become zero."""
        accumulate = []
        for interval in intervals:
            start, end = interval.row, interval.row + interval.num_ids
            accumulate.append(any(a < end and start < b for a, b in self._written))
            if accumulate[-1]:
                self.zero_unwritten(start, end)
        self._written += [(i.row, i.row + i.num_ids) for i in intervals]
        return accumulate


class _Pass:
    """One pass: its inputs in the dtypes of its arithmetic, and the results so far."""

    def __init__(self, inputs: LossInputs, wants: LossWants, chunk_bytes: int) -> None:
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        # Sums run in float32 (float64 for float64 input) however narrow the inputs are.
        self.dtype = sum_dtype(hidden.dtype)
        # On a GPU the products of bfloat16 tensors run in bfloat16, and their sums in float32. Not those of float16:
        # unscaled logit gradients would underflow.
        narrow = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.product_dtype = hidden.dtype if narrow else self.dtype
        self.inputs = inputs._replace(
            hidden=hidden,
            weight=weight.to(self.product_dtype),
            targets=inputs.targets.contiguous(),
            coef_loss=inputs.coef_loss.to(self.dtype).contiguous(),
            coef_nll=None if inputs.coef_nll is None else inputs.coef_nll.to(self.dtype).contiguous(),
            stream_embed=None if inputs.stream_embed is None else inputs.stream_embed.detach().to(self.dtype),
            bias=None if inputs.bias is None else inputs.bias.detach().to(self.dtype),
        )
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES[hidden.device.type]
        self.want_grad = any(wants.gradients)
        want_hidden, want_weight, want_embed, want_bias = wants.gradients
        has_embed, has_bias = inputs.stream_embed is not None, inputs.bias is not None
        self.want_sums = (has_embed and (want_weight or want_embed)) or (has_bias and want_bias)
        new, shape = hidden.new_zeros, inputs.targets.shape
        self.weight_gradient = _WeightGradient(weight, self.dtype) if want_weight else None
        self.result = LossResult(
            stream_loss=new(shape[1], dtype=torch.float64),
            stream_correct=new(shape[1], dtype=torch.int64),
            token_nll=new(shape, dtype=self.dtype) if wants.token_nll else None,
            token_entropy=new(shape, dtype=self.dtype) if wants.token_entropy else None,
            grad_hidden=new(hidden.shape, dtype=self.dtype) if want_hidden else None,
            grad_weight=self.weight_gradient.values if self.weight_gradient else None,
            grad_embed=new(inputs.stream_embed.shape, dtype=self.dtype)
            if want_embed and inputs.stream_embed is not None
            else None,
            grad_bias=new(inputs.bias.shape, dtype=self.dtype)
            if want_bias and inputs.bias is not None
            else None,
        )

    def finish(self) -> LossResult:
        """The results, with zeros where no row contributed."""
        self.result.stream_loss = self.result.stream_loss.to(self.dtype)
        if self.weight_gradient is not None:
            self.weight_gradient.zero_unwritten(0, len(self.weight_gradient.values))
        return self.result

    def run_kind(self, scopes: Scopes, live: Tensor, accumulate: bool) -> None:
        """All rows with a ``live`` target, whose streams have ``scopes``.

        ``accumulate``: earlier kinds may have written the rows' hidden gradients.
        """
        self.inputs = self.inputs._replace(live=live)
        for number, (group, rows) in enumerate(plan_products(scopes, live)):
            if rows.numel():
                self._run_group(group, rows, accumulate or number > 0)

    def _run_group(self, group: Group, rows: Tensor, accumulate: bool) -> None:
        inputs, dtype = self.inputs, self.product_dtype
        chunk = max(MIN_ROWS, self.chunk_bytes // (group.columns * dtype.itemsize))
        buffer = empty_in_huge_pages(min(chunk, rows.numel()), group.columns, dtype, rows.device)
        stream_bias = _stream_bias(group, inputs)
        streams = [(s, self.want_sums, slices) for s, slices in zip(group.streams, group.slices, strict=True)]
        num_sums = sum(count for slices in group.slices for _, _, count in slices)
        out = RowOutputs(
            stream_loss=inputs.hidden.new_zeros(len(streams), dtype=torch.float64),
            stream_correct=inputs.hidden.new_zeros(len(streams), dtype=torch.int64),
            column_sums=inputs.hidden.new_zeros(num_sums, dtype=self.dtype) if self.want_sums else None,
            token_nll=self.result.token_nll,
            token_entropy=self.result.token_entropy,
        )
        add_weight = self.weight_gradient.reserve(group.root) if self.weight_gradient is not None else None
        has_all_rows = rows.numel() == inputs.hidden.shape[0]
        for start in range(0, rows.numel(), chunk):
            chunk_rows, span = rows[start : start + chunk], slice(start, start + chunk)
            index = span if has_all_rows else chunk_rows
            h = inputs.hidden[index].to(dtype).contiguous()
            z = buffer[: h.shape[0]]
            for interval, columns in blocks(group, z):
                matmul_into(columns, h, _rows(inputs.weight, interval))
            loss_rows(
                z,
                chunk_rows,
                inputs,
                streams=streams,
                stream_bias=stream_bias,
                out=out,
                want_grad=self.want_grad,
            )
            if add_weight is not None:
                self._add_grad_weight(group, z, h, add_weight if start == 0 else [True] * len(group.root))
            if self.result.grad_hidden is not None:
                self._put_grad_hidden(group, z, index, accumulate)
        del buffer, z  # before the next allocation
        self.result.stream_loss[group.index] += out.stream_loss
        self.result.stream_correct[group.index] += out.stream_correct
        if out.column_sums is not None:
            self._add_rank_one_terms(group, out.column_sums)

    def _add_grad_weight(self, group: Group, grad: Tensor, h: Tensor, accumulate: Sequence[bool]) -> None:
        """``dW += Gᵀ h``, or ``=``, per interval of the root."""
        for add, (interval, columns) in zip(accumulate, blocks(group, grad), strict=True):
            add_weight_gradient(_rows(self.result.grad_weight, interval), columns, h, add)

    def _put_grad_hidden(self, group: Group, grad: Tensor, index: slice | Tensor, accumulate: bool) -> None:
        """``dH += G W``, or ``=``, in the rows ``index``."""
        whole = self.result.grad_hidden
        assert whole is not None
        out = whole[index] if isinstance(index, slice) else whole.new_empty(grad.shape[0], whole.shape[1])
        add = isinstance(index, slice) and accumulate
        for interval, columns in blocks(group, grad):
            add_hidden_gradient(out, columns, _rows(self.inputs.weight, interval), add)
            add = True
        if isinstance(index, slice):
            return
        if accumulate:
            whole.index_add_(0, index, out)
        else:
            whole[index] = out

    def _add_rank_one_terms(self, group: Group, column_sums: Tensor) -> None:
        """Add the gradients of stream embeddings and bias, and the embeddings' share of dW."""
        result, embed = self.result, self.inputs.stream_embed
        sums = column_sums.new_zeros(len(group.streams), group.columns)
        at = 0
        for k, slices in enumerate(group.slices):
            for _, begin, count in slices:
                sums[k, begin : begin + count] = column_sums[at : at + count]
                at += count
        grad_embed = sums.new_zeros(len(group.streams), self.inputs.hidden.shape[1])
        for interval, columns in blocks(group, sums):
            if embed is not None and result.grad_weight is not None:
                add_weight_gradient(_rows(result.grad_weight, interval), columns, embed[group.index], True)
            if result.grad_embed is not None:
                add_hidden_gradient(grad_embed, columns, _rows(self.inputs.weight, interval), True)
            if result.grad_bias is not None:
                _rows(result.grad_bias, interval).add_(columns.sum(dim=0))
        if result.grad_embed is not None:
            result.grad_embed[group.index] += grad_embed


def plan_products(scopes: Scopes, live: Tensor) -> list[tuple[Group, Tensor]]:
    """Groups of streams, and the rows int64 ``[R]`` in which any of a group's streams is live."""
    groups = [(group, _live_rows(live[:, group.index])) for group in group_streams(scopes)]
    if len(groups) == 2:
        whole = group_all(scopes)
        rows = _live_rows(live)
        cost = sum(len(part) * group.columns for group, part in groups)
        if len(rows) * whole.columns <= _ONE_PRODUCT * cost:
            return [(whole, rows)]
    return groups


def _live_rows(live: Tensor) -> Tensor:
    """Rows with a live target. On a GPU this synchronizes: the products' sizes depend on their number."""
    if capturing(live):
        return torch.arange(live.shape[0], device=live.device)
    return live.any(dim=1).nonzero().squeeze(1)


def _rows(matrix: Tensor | None, interval: Interval) -> Tensor:
    return matrix[interval.row : interval.row + interval.num_ids]  # type: ignore[index]


def blocks(group: Group, matrix: Tensor) -> list[tuple[Interval, Tensor]]:
    """Each interval of the root with its columns of ``matrix``."""
    return [
        (interval, matrix[:, begin : begin + interval.num_ids])
        for interval, begin in zip(group.root, group.begins, strict=True)
    ]


def _stream_bias(group: Group, inputs: LossInputs) -> Tensor | None:
    """Per-stream logit bias ``[k, C]``; undefined outside the stream's scope.

    Summed in float64: all rows share it, so its error would not average out over them.
    """
    weight, embed, bias = inputs.weight, inputs.stream_embed, inputs.bias
    if embed is None and bias is None:
        return None
    out = torch.empty(len(group.streams), group.columns, dtype=sum_dtype(weight.dtype), device=weight.device)
    members: dict[tuple[int, int], list[int]] = {}
    for k, slices in enumerate(group.slices):
        for _, begin, count in slices:
            members.setdefault((begin, count), []).append(k)
    for (begin, count), ks in members.items():
        columns = out[:, begin : begin + count]
        ids = slice(group.row_of(begin), group.row_of(begin) + count)
        vectors = None if embed is None else embed[as_index([group.streams[k] for k in ks])].double()
        if bias is None and weight.device.type == "cpu" and not vectors.any():  # type: ignore[union-attr]
            columns[as_index(ks)] = 0
            continue
        on_cpu = weight.device.type == "cpu"
        tasks = [
            partial(
                _put_bias,
                columns[:, tile],
                as_index(ks),
                weight[ids][tile],
                vectors,
                None if bias is None else bias[ids][tile],
            )
            for tile in (weight_tiles(count, _WIDE_ROWS) if on_cpu else _gpu_tiles(count))
        ]
        if on_cpu:
            run(tasks, count * len(ks) * weight.shape[1])
        else:
            for task in tasks:
                task()
    return out


def _gpu_tiles(num_rows: int) -> list[slice]:
    """Tiles of the weight's rows, as large as their memory allows: each of them is several launches."""
    return [
        slice(start, min(start + _WIDE_ROWS_GPU, num_rows)) for start in range(0, num_rows, _WIDE_ROWS_GPU)
    ]


def _put_bias(
    out: Tensor, index: slice | list[int], weight: Tensor, vectors: Tensor | None, bias: Tensor | None
) -> None:
    """``out[index] = vectors weightᵀ + bias`` with float64 ``vectors``, either of them None for none."""
    total = None if bias is None else bias.double()
    if vectors is not None:
        product = vectors @ weight.double().T
        total = product if total is None else product + total
    assert total is not None
    out[index] = total.to(out.dtype)
