"""What the streams' vectors and the bias add to a product that all streams share.

The logits of stream s are ``h Wᵀ + b_s`` with ``b_s = e_s Wᵀ + bias``; with the column sums c_s of its gradient,
``dW += c_sᵀ e_s`` and ``de_s = c_s W``. Streams without a vector, in a model without a bias, have neither.

For bfloat16 weights on a GPU the rows e_s and c_s are split into sums of bfloat16 rows, so that their products run at
the speed of bfloat16 and read the weight once, as it is: e_s exact to float32, since all rows of a batch share the
error of b_s, and c_s to 16 bits, which is far more than the logits' gradients beside it have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.matmul import (
    add_hidden_gradient,
    run,
    split_bfloat16,
    weight_tiles,
)
from speechlm_ext.ops.multistream_loss.scopes import Group, as_index
from speechlm_ext.ops.multistream_loss.types import LossInputs, sum_dtype

#: Rows of the weight that are widened to float64 at a time, in memory besides the logits.
_WIDE_ROWS, _WIDE_ROWS_GPU = 256, 16_384


class Range(NamedTuple):
    """Columns ``begin`` to ``end - 1`` of the logits, whose weights are the rows from ``row`` on."""

    begin: int
    end: int
    row: int

    @property
    def weights(self) -> slice:
        """Its rows of the weight."""
        return slice(self.row, self.row + self.end - self.begin)


def take_rows(matrix: Tensor, numbers: Sequence[int]) -> Tensor:
    """Rows of a matrix, without an index on the device."""
    index = as_index(numbers)
    return matrix[index] if isinstance(index, slice) else torch.stack([matrix[i] for i in numbers])


class StreamTerms:
    """The vectors and the bias of a group's streams.

    Args:
        inputs: of the pass; ``stream_embed`` in its own dtype, the weight in that of the products.
        want_vectors: whether the column sums of streams with a vector are wanted.
        want_bias: whether those of all streams are.
    """

    def __init__(self, group: Group, inputs: LossInputs, want_vectors: bool, want_bias: bool) -> None:
        self.group, self.inputs = group, inputs
        num_streams, embed = inputs.targets.shape[1], inputs.stream_embed
        num_bare = num_streams if embed is None else num_streams - embed.shape[0]
        #: Rows of stream_embed of the group's streams that have a vector, its last ones.
        self.vectors = [s - num_bare for s in group.streams if s >= num_bare]
        self.num_bare = len(group.streams) - len(self.vectors)
        self.is_narrow = inputs.weight.is_cuda and inputs.weight.dtype == torch.bfloat16
        has_bias = inputs.bias is not None
        self.streams = [
            (s, has_bias or k >= self.num_bare, want_bias or (want_vectors and k >= self.num_bare), slices)
            for k, (s, slices) in enumerate(zip(group.streams, group.slices, strict=True))
        ]
        """See `row_kernel.Stream`."""
        self.num_sums = sum(wants for _, _, wants, _ in self.streams)
        # dW += Σ cᵀ e over pairs of the parts of c and e; the first ones have e's first part.
        parts_c = 2 if self.is_narrow else 1
        parts_e = 2 if self.is_narrow and embed is not None and embed.dtype != torch.bfloat16 else 1
        self._pairs = [(i, j) for j in range(parts_e) for i in range(parts_c) if i + j < 2]
        self._parts_c, self._want_vectors = parts_c, want_vectors

    @property
    def num_extra_rows(self) -> int:
        """Rows of `extra_gradient`."""
        return len(self._pairs) * len(self.vectors) if self._want_vectors else 0

    def bias_rows(self) -> Tensor | None:
        """``b_s`` of the streams that have one, ``[k, C]``; undefined outside the stream's scope."""
        num_rows = sum(has_bias for _, has_bias, _, _ in self.streams)
        if num_rows == 0:
            return None
        weight = self.inputs.weight
        shape = (num_rows, self.group.columns)
        out = torch.empty(shape, dtype=sum_dtype(weight.dtype), device=weight.device)
        if self.is_narrow:
            self._put_narrow_bias(out)
        else:
            self._put_wide_bias(out)
        return out

    def extra_gradient(self, column_sums: Tensor, out: Tensor) -> None:
        """Rows that join those of the logits' gradient in dW, for the rows `extra_hidden`."""
        num = len(self.vectors)
        sums = column_sums[len(column_sums) - num :]
        out[:num].copy_(sums)
        if self._parts_c > 1:
            torch.sub(sums, out[:num], out=out[num : 2 * num])
        if len(self._pairs) > 2:
            out[2 * num :].copy_(out[:num])

    def extra_hidden(self, dtype: torch.dtype) -> list[Tensor]:
        """The rows of the hidden states that belong to those of `extra_gradient`."""
        assert self.inputs.stream_embed is not None
        vectors = take_rows(self.inputs.stream_embed, self.vectors)
        if not self.is_narrow:
            return [vectors.to(dtype)]
        num_parts = 1 + max(j for _, j in self._pairs)
        parts = split_bfloat16(vectors, num_parts)
        return [parts[j] for _, j in self._pairs]

    def add_vector_gradient(self, grad_embed: Tensor, extra: Tensor, accumulate: bool) -> None:
        """``de_s += c_s W``, or ``=`` over zeros, from the rows of `extra_gradient`."""
        num_vectors, width = len(self.vectors), self.inputs.hidden.shape[1]
        rows = extra[: self._parts_c * num_vectors]
        out = grad_embed.new_empty(len(rows), width)
        for number, part in enumerate(self._vector_ranges()):
            weight = self.inputs.weight[part.weights]
            add_hidden_gradient(out, rows[:, part.begin : part.end], weight, number > 0)
        parts = out.view(self._parts_c, num_vectors, width)
        index = as_index(self.vectors)
        if isinstance(index, slice) and not accumulate:
            torch.sum(parts, dim=0, out=grad_embed[index])
        elif isinstance(index, slice):
            grad_embed[index].add_(parts.sum(dim=0) if len(parts) > 1 else parts[0])
        else:
            for row, at in enumerate(self.vectors):
                grad_embed[at].add_(parts[:, row].sum(dim=0))

    def _vector_ranges(self) -> list[Range]:
        """The columns of all streams with a vector, joined where they and their rows of the weight touch."""
        merged: list[Range] = []
        parts = {
            Range(begin, begin + count, self.group.row_of(begin))
            for slices in self.group.slices[self.num_bare :]
            for _, begin, count in slices
        }
        for part in sorted(parts):
            last = merged[-1] if merged else None
            if last and part.begin <= last.end and part.begin - last.begin == part.row - last.row:
                merged[-1] = last._replace(end=max(last.end, part.end))
            else:
                merged.append(part)
        return merged

    def _put_narrow_bias(self, out: Tensor) -> None:
        inputs, num_vectors = self.inputs, len(self.vectors)
        if num_vectors:
            assert inputs.stream_embed is not None
            vectors = take_rows(inputs.stream_embed, self.vectors)
            num_parts = 1 if vectors.dtype == torch.bfloat16 else 3
            rows = torch.cat(split_bfloat16(vectors, num_parts)) if num_parts > 1 else vectors
            for part in self._vector_ranges():
                to = out[len(out) - num_vectors :, part.begin : part.end]
                product = to if num_parts == 1 else to.new_empty(len(rows), part.end - part.begin)
                add_hidden_gradient(product, rows, inputs.weight[part.weights].T, False)
                if num_parts > 1:
                    to.copy_(product.view(num_parts, num_vectors, -1).sum(dim=0))
        if inputs.bias is None:
            return
        for interval, begin in zip(self.group.root, self.group.begins, strict=True):
            bias = inputs.bias[interval.row : interval.row + interval.num_ids]
            to = out[:, begin : begin + interval.num_ids]
            to[: self.num_bare] = bias
            to[self.num_bare :] += bias

    def _put_wide_bias(self, out: Tensor) -> None:
        """Summed in float64: all rows share it, so its error would not average out over them."""
        inputs, weight = self.inputs, self.inputs.weight
        first = len(self.streams) - len(out)  # streams before it have no row
        members: dict[tuple[int, int, bool], list[int]] = {}
        for k, slices in enumerate(self.group.slices):
            for _, begin, count in slices if k >= first else ():
                members.setdefault((begin, count, k >= self.num_bare), []).append(k)
        on_cpu = weight.device.type == "cpu"
        for (begin, count, has_vector), ks in members.items():
            columns = out[:, begin : begin + count]
            ids = slice(self.group.row_of(begin), self.group.row_of(begin) + count)
            vectors = None
            if has_vector:
                assert inputs.stream_embed is not None
                vectors = take_rows(
                    inputs.stream_embed, [self.vectors[k - self.num_bare] for k in ks]
                ).double()
            tiles = weight_tiles(count, _WIDE_ROWS) if on_cpu else _gpu_tiles(count)
            tasks = [
                partial(
                    _put_bias,
                    columns[:, tile],
                    [k - first for k in ks],
                    weight[ids][tile],
                    vectors,
                    None if inputs.bias is None else inputs.bias[ids][tile],
                )
                for tile in tiles
            ]
            if on_cpu:
                run(tasks, count * len(ks) * weight.shape[1])
            else:
                for task in tasks:
                    task()


def _gpu_tiles(num_rows: int) -> list[slice]:
    """Tiles of the weight's rows, as large as their memory allows: each of them is several launches."""
    return [
        slice(start, min(start + _WIDE_ROWS_GPU, num_rows)) for start in range(0, num_rows, _WIDE_ROWS_GPU)
    ]


def _put_bias(
    out: Tensor, rows: Sequence[int], weight: Tensor, vectors: Tensor | None, bias: Tensor | None
) -> None:
    """``out[rows] = vectors weightᵀ + bias`` with float64 ``vectors``, either of them None for none."""
    total = None if bias is None else bias.double().expand(len(rows), -1)
    if vectors is not None:
        product = vectors @ weight.double().T
        total = product if total is None else product + total
    assert total is not None
    index = as_index(rows)
    if isinstance(index, slice):
        out[index] = total.to(out.dtype)
    else:
        for row, values in zip(rows, total, strict=True):
            out[row] = values.to(out.dtype)
