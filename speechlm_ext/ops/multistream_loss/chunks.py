"""multistream_loss, chunk by chunk.

Per group of streams that one product serves: ``Z = h Wᵀ`` of a chunk of rows into a buffer that all chunks share, the
row kernel, which replaces Z by the streams' summed logit gradients G, then ``dH = G W`` and ``dW += Gᵀ h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from speechlm_ext.ops.common.matmul import add_hidden_gradient, add_weight_gradient, matmul_into
from speechlm_ext.ops.common.memory import empty_in_huge_pages
from speechlm_ext.ops.multistream_loss.row_kernel import RowOutputs, loss_rows
from speechlm_ext.ops.multistream_loss.rows import plan_rows, planned_rows
from speechlm_ext.ops.multistream_loss.scopes import Group, Interval
from speechlm_ext.ops.multistream_loss.stream_terms import StreamTerms
from speechlm_ext.ops.multistream_loss.types import (
    LossInputs,
    LossResult,
    LossWants,
    product_gradient_dtype,
    sum_dtype,
)

#: Bytes of logits in a chunk, but at least MIN_ROWS rows: with fewer, the products wait for memory.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 384 << 20}
MIN_ROWS = 512
#: On a GPU of at least this memory: the logits of a product that fit into one chunk, and the chunks of others, which
#: need a float32 gradient of the weight as well.
_LARGE_GPU, _ONE_CHUNK, _CHUNK = 36 << 30, 1 << 30, 512 << 20


def loss_pass(inputs: LossInputs, wants: LossWants, chunk_bytes: int = 0) -> LossResult:
    """Results of the pass; ``chunk_bytes``: bytes of logits in a chunk, 0 for the device's default."""
    # Nothing may synchronize while a CUDA graph is being captured, so without a plan no row can be left out.
    keep_all = inputs.rows is None and capturing(inputs.hidden)
    if inputs.rows is None:
        plan = plan_rows(inputs.sets, inputs.live, inputs.row_scope, keep_all)
    else:
        plan = planned_rows(inputs.sets, inputs.rows, inputs.row_counts)
    work = _Pass(inputs, wants, chunk_bytes, plan)
    # Rows of two kinds are disjoint, unless every kind computes all rows. A plan may be of other kinds than the rows
    # have now: their targets are then not live, and `finish` finds too few.
    by_kind = inputs.live_by_kind() if keep_all or inputs.rows is not None else None
    for kind, products in enumerate(plan):
        live = inputs.live if by_kind is None else by_kind[kind]
        for number, (group, rows) in enumerate(products):
            work.run_group(group, rows, live.contiguous(), number > 0 or (keep_all and kind > 0))
    return work.finish()


def capturing(tensor: Tensor) -> bool:
    """True while a CUDA graph is being captured."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def chunk_rows(group: Group, num_rows: int, dtype: torch.dtype, device: torch.device, given: int = 0) -> int:
    """Rows of a chunk; ``given``: bytes of its logits, 0 for the device's default. Nothing waits for a GPU."""
    size = group.columns * dtype.itemsize
    if given == 0 and device.type == "cuda":
        given = CHUNK_BYTES["cuda"]
        if torch.cuda.get_device_properties(device).total_memory >= _LARGE_GPU:
            given = _ONE_CHUNK if num_rows * size <= _ONE_CHUNK else _CHUNK
    return max(MIN_ROWS, (given or CHUNK_BYTES[device.type]) // size)


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

    def __init__(
        self,
        inputs: LossInputs,
        wants: LossWants,
        chunk_bytes: int,
        plan: Sequence[Sequence[tuple[Group, Tensor]]],
    ) -> None:
        hidden, weight, embed = inputs.hidden.detach(), inputs.weight.detach(), inputs.stream_embed
        # Sums run in float32 (float64 for float64 input) however narrow the inputs are.
        self.dtype = sum_dtype(hidden.dtype)
        # On a GPU the products of bfloat16 tensors run in bfloat16, and their sums in float32. Not those of float16:
        # unscaled logit gradients would underflow. On the CPU their factors are rounded, and multiplied in float32.
        is_narrow = inputs.narrow or (hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16)
        self.product_dtype = torch.bfloat16 if is_narrow and hidden.is_cuda else self.dtype
        self.rounded = torch.bfloat16 if is_narrow else self.dtype
        self.inputs = inputs._replace(
            hidden=hidden,
            weight=weight.to(self.rounded).to(self.product_dtype),
            targets=inputs.targets.contiguous(),
            coef_loss=inputs.coef_loss.to(self.dtype).contiguous(),
            coef_nll=None if inputs.coef_nll is None else inputs.coef_nll.to(self.dtype).contiguous(),
            stream_embed=None if embed is None else embed.detach(),
            bias=None if inputs.bias is None else inputs.bias.detach().to(self.dtype),
        )
        self.num_live = None if inputs.rows is None else inputs.live.sum(dim=0)
        self.chunk_bytes = chunk_bytes
        self.want_grad = any(wants.gradients)
        want_hidden, want_weight, want_embed, want_bias = wants.gradients
        self.want_vectors = embed is not None and (want_weight or want_embed)
        self.want_bias = inputs.bias is not None and want_bias
        self._vectors_written: set[int] = set()  # rows of stream_embed whose gradient has been written
        new, shape = hidden.new_zeros, inputs.targets.shape
        sums = new(3, shape[1], dtype=torch.int64)  # of 8 bytes each, in one launch
        self.gradient_dtype = product_gradient_dtype(hidden, weight)
        # Where one product writes each row, its own rounding is the only one.
        products = [product for products in plan for product in products]
        of_weight = self.gradient_dtype if self._writes_weight_once(products) else self.dtype
        of_hidden = self.gradient_dtype if self._writes_hidden_once(plan) else self.dtype
        self.weight_gradient = _WeightGradient(weight, of_weight) if want_weight else None
        self.result = LossResult(
            stream_loss=sums[2].view(torch.float64),
            stream_counts=sums[:2],
            token_nll=new(shape, dtype=self.dtype) if wants.token_nll else None,
            token_entropy=new(shape, dtype=self.dtype) if wants.token_entropy else None,
            grad_hidden=new(hidden.shape, dtype=of_hidden) if want_hidden else None,
            grad_weight=self.weight_gradient.values if self.weight_gradient else None,
            grad_embed=new(embed.shape, dtype=self.dtype) if want_embed and embed is not None else None,
            grad_bias=new(inputs.bias.shape, dtype=self.dtype)
            if want_bias and inputs.bias is not None
            else None,
        )

    def _chunk_rows(self, group: Group, rows: Tensor) -> int:
        return chunk_rows(group, len(rows), self.product_dtype, rows.device, self.chunk_bytes)

    def _writes_weight_once(self, products: Sequence[tuple[Group, Tensor]]) -> bool:
        """Whether no row of dW is added to."""
        if any(len(rows) > self._chunk_rows(group, rows) for group, rows in products):
            return False
        spans = sorted((i.row, i.row + i.num_ids) for group, _ in products for i in group.root)
        return all(end <= start for (_, end), (start, _) in pairwise(spans))

    def _writes_hidden_once(self, plan: Sequence[Sequence[tuple[Group, Tensor]]]) -> bool:
        """Whether no row of dH is added to."""
        if sum(map(bool, plan)) > 1 and self.inputs.rows is None and capturing(self.inputs.hidden):
            return False  # every kind computes all rows
        return all(len(products) <= 1 and all(len(g.root) == 1 for g, _ in products) for products in plan)

    def finish(self) -> LossResult:
        """The results, with zeros where no row contributed."""
        result = self.result
        # A copy: the op's results share no memory.
        result.stream_loss = result.stream_loss.to(self.dtype, copy=True)
        if self.inputs.rows is not None:
            # A plan for other tensors leaves out targets: no loss is better than a wrong one.
            is_wrong = result.stream_counts[1] != self.num_live
            result.stream_loss.masked_fill_(is_wrong, float("nan"))
        if self.weight_gradient is not None:
            self.weight_gradient.zero_unwritten(0, len(self.weight_gradient.values))
            result.grad_weight = self.weight_gradient.values.to(self.gradient_dtype)
        if result.grad_hidden is not None:
            result.grad_hidden = result.grad_hidden.to(self.gradient_dtype)
        return result

    def run_group(self, group: Group, rows: Tensor, live: Tensor, accumulate: bool) -> None:
        """All rows of one product. ``accumulate``: an earlier product may have written their hidden gradients."""
        inputs = self.inputs._replace(live=live)
        terms = StreamTerms(group, inputs, self.want_vectors, self.want_bias)
        chunk, extra = min(self._chunk_rows(group, rows), len(rows)), terms.num_extra_rows
        buffer = empty_in_huge_pages(chunk + extra, group.columns, self.product_dtype, rows.device)
        bias_rows, result = terms.bias_rows(), self.result
        out = RowOutputs(
            stream_loss=result.stream_loss,
            stream_correct=result.stream_counts[0],
            stream_count=result.stream_counts[1],
            column_sums=inputs.hidden.new_zeros(terms.num_sums, group.columns, dtype=self.dtype)
            if terms.num_sums
            else None,
            token_nll=result.token_nll,
            token_entropy=result.token_entropy,
        )
        add_weight = self.weight_gradient.reserve(group.root) if self.weight_gradient is not None else None
        has_all_rows = len(rows) == inputs.hidden.shape[0]
        for start in range(0, len(rows), chunk):
            index = (
                slice(start, min(start + chunk, len(rows))) if has_all_rows else rows[start : start + chunk]
            )
            h = inputs.hidden[index].to(self.rounded).to(self.product_dtype).contiguous()
            n = len(h)
            z = buffer[:n]
            for interval, columns in blocks(group, z):
                matmul_into(columns, h, _rows(inputs.weight, interval))
            loss_rows(
                z,
                rows[start : start + chunk],
                inputs,
                streams=terms.streams,
                stream_bias=bias_rows,
                out=out,
                want_grad=self.want_grad,
            )
            if result.grad_hidden is not None:
                self._put_grad_hidden(group, z, index, accumulate)
            if extra and start + chunk >= len(rows):  # the column sums are complete
                assert out.column_sums is not None
                terms.extra_gradient(out.column_sums, buffer[n : n + extra])
                if result.grad_embed is not None:
                    accumulate_vectors = not self._vectors_written.isdisjoint(terms.vectors)
                    terms.add_vector_gradient(result.grad_embed, buffer[n : n + extra], accumulate_vectors)
                    self._vectors_written.update(terms.vectors)
                if add_weight is not None:
                    z, h = buffer[: n + extra], torch.cat([h, *terms.extra_hidden(h.dtype)])
            if add_weight is not None:
                self._add_grad_weight(group, z, h, add_weight if start == 0 else [True] * len(group.root))
        if result.grad_bias is not None and out.column_sums is not None:
            for interval, columns in blocks(group, out.column_sums):
                _rows(result.grad_bias, interval).add_(columns.sum(dim=0))

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


def _rows(matrix: Tensor | None, interval: Interval) -> Tensor:
    return matrix[interval.row : interval.row + interval.num_ids]  # type: ignore[index]


def blocks(group: Group, matrix: Tensor) -> list[tuple[Interval, Tensor]]:
    """Each interval of the root with its columns of ``matrix``."""
    return [
        (interval, matrix[:, begin : begin + interval.num_ids])
        for interval, begin in zip(group.root, group.begins, strict=True)
    ]
