"""torch.library registration of multistream_loss, its chunks, and its autograd.

Per group of streams that one product serves: ``Z = h Wᵀ`` of a chunk of rows into a buffer that all chunks share, the row
kernel, which turns Z into the streams' summed logit gradients G in place, then ``dH = G W`` and ``dW += Gᵀ h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from speechlm_ext.ops._memory import empty_in_huge_pages, lazy_zeros
from speechlm_ext.ops._native import LIBRARY, OpError, native
from speechlm_ext.ops.reference.multistream_loss import (
    Interval,
    LossOptions,
    LossResult,
    local_targets,
    loss_pass,
    merge_intervals,
)

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


def flatten_scopes(scopes: Scopes) -> list[int]:
    """Scopes as the op's schema can carry them: for each stream the number of its intervals, then their borders."""
    return [
        value
        for scope in scopes
        for value in (len(scope), *(border for interval in scope for border in interval))
    ]


def _unflatten(flat: Sequence[int]) -> Scopes:
    scopes, at = [], 0
    while at < len(flat):
        count = flat[at]
        borders = flat[at + 1 : at + 1 + 2 * count]
        scopes.append(tuple(zip(borders[::2], borders[1::2], strict=True)))
        at += 1 + 2 * count
    return tuple(scopes)


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
        result.grad_weight = lazy_zeros(*weight.shape, dtype)
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


def check_values(targets: Tensor, loss_weight: Tensor, live: Tensor, scopes: Scopes) -> None:
    """Refuses weights that mean nothing and live targets that their softmax does not contain."""
    bad_weight = ~((loss_weight >= 0) & loss_weight.isfinite())
    if bool(bad_weight.any()):
        n, s = bad_weight.nonzero()[0].tolist()
        raise OpError(
            f"multistream_loss: loss_weight[{n}, {s}] is {float(loss_weight[n, s])}; weights must be finite and >= 0"
        )
    for s, scope in enumerate(scopes):
        outside = live[:, s] & (local_targets(targets[:, s], scope) < 0)
        if bool(outside.any()):
            n = int(outside.nonzero()[0])
            raise OpError(
                f"multistream_loss: targets[{n}, {s}] (row {n}, stream {s}) is id {int(targets[n, s])}, outside the "
                f"stream's scope {list(scope)}, with weight {float(loss_weight[n, s])}. Give it weight 0 or widen the "
                "scope"
            )


LIBRARY.define(
    "multistream_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor live, Tensor coef, Tensor? coef_nll, "
    "Tensor? stream_embed, Tensor? bias, int[] scopes, float z_loss, float label_smoothing, float softcap, "
    "bool want_grad, bool want_tokens, bool check) -> Tensor[]"
)


def _op(run):  # type: ignore[no-untyped-def]
    def op(  # type: ignore[no-untyped-def]
        hidden, weight, targets, live, coef, coef_nll, stream_embed, bias, scopes, z_loss, label_smoothing, softcap,
        want_grad, want_tokens, check,
    ):  # fmt: skip
        unpacked = _unflatten(scopes)
        if check:
            check_values(targets, coef, live, unpacked)
        options = LossOptions(z_loss, label_smoothing, softcap or None)
        with torch.autocast(hidden.device.type, enabled=False):
            result = run(
                hidden, weight, targets, live, coef, coef_nll, unpacked, stream_embed, bias, options, want_grad,
                want_tokens,
            )  # fmt: skip
        out = [result.stream_loss, result.stream_correct]
        out += [result.token_nll] if want_tokens else []
        if not want_grad:
            return out
        gradients = (result.grad_hidden, result.grad_weight, result.grad_embed, result.grad_bias)
        return out + [g for g in gradients if g is not None]

    return op


LIBRARY.impl("multistream_loss", _op(native_pass), "CPU")
LIBRARY.impl("multistream_loss", _op(loss_pass), "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_loss", lib=LIBRARY)
def _fake(  # type: ignore[no-untyped-def]
    hidden, weight, targets, live, coef, coef_nll, stream_embed, bias, scopes, z_loss, label_smoothing, softcap,
    want_grad, want_tokens, check,
):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    S = targets.shape[1]
    out = [hidden.new_empty(S, dtype=dtype), hidden.new_empty(S, dtype=torch.int64)]
    out += [hidden.new_empty(targets.shape, dtype=dtype)] if want_tokens else []
    given = (hidden, weight, stream_embed, bias) if want_grad else ()
    return out + [t.new_empty(t.shape, dtype=dtype) for t in given if t is not None]


class MultiStreamLossFunction(torch.autograd.Function):
    """``(loss_sum, stream_loss, token_nll or empty, stream_correct)`` with gradients through loss_sum and token_nll.

    With ``per_token`` false the gradients are computed in forward and only scaled in backward; with true the logits are
    computed again in backward, because the gradient of each token is not known before.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden,
        weight,
        stream_embed,
        bias,
        targets,
        live,
        loss_weight,
        scopes,
        options,
        per_token,
        want_grad,
    ):
        wants = want_grad and any(ctx.needs_input_grad[:4])
        settings = (scopes, options.z_loss, options.label_smoothing, options.softcap or 0.0)
        stream_loss, stream_correct, *rest = torch.ops.speechlm_ext.multistream_loss(
            hidden, weight, targets, live, loss_weight, None, stream_embed, bias, *settings, wants and not per_token,
            per_token, True,
        )  # fmt: skip
        loss_sum = stream_loss.sum()
        ctx.per_token, ctx.settings = per_token, settings
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, stream_embed, bias)]
        ctx.gradients = None
        if wants and (per_token or not torch.compiler.is_compiling()):
            ctx.save_for_backward(hidden, weight, stream_embed, bias, targets, live, loss_weight)
            ctx.gradients = None if per_token else rest
        elif wants:
            ctx.save_for_backward(*rest)
        token_nll = rest[0] if per_token else loss_sum.new_empty(0)
        ctx.mark_non_differentiable(stream_loss, stream_correct)
        return loss_sum, stream_loss, token_nll, stream_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _grad_stream, grad_nll, _grad_correct):  # type: ignore[override]
        if ctx.gradients is not None:
            # Scaled where they lie and handed out: a second copy of a large table's gradient would be the op's largest
            # tensor. Whoever goes back a second time (retain_graph) gets them computed again.
            gradients, ctx.gradients = ctx.gradients, None
            torch._foreach_mul_(gradients, grad_sum)
        elif len(ctx.saved_tensors) == 7:
            hidden, weight, stream_embed, bias, targets, live, loss_weight = ctx.saved_tensors
            _, _, *gradients = torch.ops.speechlm_ext.multistream_loss(
                hidden, weight, targets, live, loss_weight * grad_sum, grad_nll if ctx.per_token else None,
                stream_embed, bias, *ctx.settings, True, False, False,
            )  # fmt: skip
        else:
            gradients = [g * grad_sum for g in ctx.saved_tensors]
        return (*_rounded(gradients, ctx.dtypes), None, None, None, None, None, None, None)


def _rounded(gradients: list[Tensor], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Each gradient at its place, rounded to its input's dtype at the very end. Empties the list: a gradient that nobody
    else holds becomes ``.grad`` without being copied."""
    gradients.reverse()
    return [None if dtype is None else gradients.pop().to(dtype) for dtype in dtypes]
