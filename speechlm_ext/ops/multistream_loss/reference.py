"""multistream_loss in plain torch: one GEMM for all streams that share a scope, chunked, gradients by hand.

The hidden state of stream s is ``h + e_s``, so its logits are ``h Wᵀ + e_s Wᵀ``: the product ``Z = h Wᵀ`` is computed
once per row and each stream adds a bias row. In backward the streams' logit gradients are summed in one buffer ``G``
before the two large products ``dH = G W`` and ``dW = Gᵀ H``; ``e_s`` adds the rank-one term ``colsum(g_s) ⊗ e_s`` to
dW. Nothing of size N·S·V or N·S·D is materialized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.multistream_loss.scopes import Interval, Scopes, local_targets
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossResult, LossWants, sum_dtype

#: Bytes of logits per chunk (a chunk has at least _MIN_ROWS rows). On the CPU the C library returns buffers of more
#: than 32 MiB to the system at once, and zeroing their pages again for each chunk costs more than the arithmetic.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 384 << 20}
_MIN_ROWS = 512


def group_streams(scopes: Scopes) -> list[tuple[tuple[Interval, ...], list[int]]]:
    """Groups of streams that share one GEMM: a widest scope, and the streams whose scopes are inside it."""
    groups: list[tuple[tuple[Interval, ...], list[int]]] = []
    for s in sorted(range(len(scopes)), key=lambda s: -sum(i.num_ids for i in scopes[s])):
        for root, members in groups:
            if all(local_columns(root, [i]) for i in scopes[s]):
                members.append(s)
                break
        else:
            groups.append((scopes[s], [s]))
    return groups


def local_columns(root: Sequence[Interval], scope: Sequence[Interval]) -> list[slice]:
    """The columns of a scope's intervals among the concatenated intervals of ``root``; others are left out."""
    slices = []
    for i in scope:
        base = 0
        for outer in root:
            if outer.row <= i.row and i.row + i.num_ids <= outer.row + outer.num_ids:
                slices.append(slice(base + i.row - outer.row, base + i.row - outer.row + i.num_ids))
                break
            base += outer.num_ids
    return slices


def _rows_of(matrix: Tensor, intervals: Sequence[Interval]) -> Tensor:
    parts = [matrix[i.row : i.row + i.num_ids] for i in intervals]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _columns(matrix: Tensor, slices: Sequence[slice]) -> Tensor:
    return matrix[:, slices[0]] if len(slices) == 1 else torch.cat([matrix[:, c] for c in slices], dim=1)


def _stream_pass(
    logits: Tensor,
    target: Tensor,
    coef_loss: Tensor,
    coef_nll: Tensor | None,
    inputs: LossInputs,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Cross-entropy of ``logits [R, C]``: loss, nll, entropy, is_correct, each ``[R]``, and dlogits ``[R, C]``."""
    capped_slope = None
    if inputs.softcap:
        tanh = torch.tanh(logits / inputs.softcap)
        logits = inputs.softcap * tanh
        capped_slope = 1 - tanh * tanh if want_grad else None
    largest = logits.amax(dim=1)
    below = (logits - largest[:, None]).clamp_(min=-87)  # 0 · -infinity is 0 in the entropy
    exponentials = torch.sub(logits, largest[:, None]).exp_()
    total = exponentials.sum(dim=1)
    entropy = total.log() - below.mul_(exponentials).sum(dim=1) / total
    lse = largest + total.log()
    at_target = logits.gather(1, target[:, None]).squeeze(1)
    nll = lse - at_target
    is_correct = at_target == largest
    eps, classes = inputs.label_smoothing, logits.shape[1]
    loss = nll
    if eps:
        loss = (1 - eps) * nll + eps * (lse - logits.mean(dim=1))
    if inputs.z_loss:
        loss = loss + inputs.z_loss * lse * lse
    if not want_grad:
        return loss, nll, entropy, is_correct, None
    scale = coef_loss * (1 + 2 * inputs.z_loss * lse)
    at = coef_loss * (1 - eps)
    if coef_nll is not None:
        scale, at = scale + coef_nll, at + coef_nll
    grad = exponentials.mul_((scale / total)[:, None])  # scale * softmax
    if eps:
        grad.sub_((coef_loss * (eps / classes))[:, None])
    grad.scatter_add_(1, target[:, None], -at[:, None])
    if capped_slope is not None:
        grad.mul_(capped_slope)
    return loss, nll, entropy, is_correct, grad


def loss_pass(inputs: LossInputs, wants: LossWants, chunk_bytes: int = 0) -> LossResult:
    """Losses of all live targets, and all gradients if any is wanted.

    Args:
        chunk_bytes: bytes of logits per chunk; 0 for the device's default.
    """
    hidden, targets, coef_nll = inputs.hidden, inputs.targets, inputs.coef_nll
    # Sums run in float32 (float64 for float64 input) however narrow the inputs are.
    dtype, device, want_grad = sum_dtype(hidden.dtype), hidden.device, any(wants.gradients)
    stream_loss = torch.zeros(targets.shape[1], dtype=dtype, device=device)
    stream_correct = torch.zeros(targets.shape[1], dtype=torch.int64, device=device)
    token_nll = torch.zeros(targets.shape, dtype=dtype, device=device) if wants.token_nll else None
    token_entropy = torch.zeros(targets.shape, dtype=dtype, device=device) if wants.token_entropy else None
    result = LossResult(stream_loss, stream_correct, token_nll, token_entropy)
    weight_f = inputs.weight.to(dtype)
    embed_f = None if inputs.stream_embed is None else inputs.stream_embed.to(dtype)
    bias_f = None if inputs.bias is None else inputs.bias.to(dtype)
    if want_grad:
        result.grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device)
        result.grad_weight = torch.zeros(weight_f.shape, dtype=dtype, device=device)
        result.grad_embed = None if embed_f is None else torch.zeros_like(embed_f)
        result.grad_bias = None if bias_f is None else torch.zeros_like(bias_f)

    for scopes, live_here, root, members in _parts(inputs):
        rows = live_here[:, members].any(dim=1).nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        root_weight = _rows_of(weight_f, root)
        num_columns = root_weight.shape[0]
        root_bias = None if bias_f is None else _rows_of(bias_f[:, None], root).squeeze(1)
        grad_root = torch.zeros_like(root_weight) if want_grad else None
        column_sums = {s: torch.zeros(num_columns, dtype=dtype, device=device) for s in members}
        stream_bias: dict[int, Tensor | None] = {}
        for s in members:
            parts = [] if root_bias is None else [root_bias]
            if embed_f is not None:
                parts.append(root_weight @ embed_f[s])
            stream_bias[s] = sum(parts[1:], parts[0]) if parts else None
        chunk = max(_MIN_ROWS, (chunk_bytes or _CHUNK_BYTES[device.type]) // (num_columns * dtype.itemsize))
        for chunk_rows in rows.split(chunk):
            hidden_rows = hidden[chunk_rows].to(dtype)
            logits = hidden_rows @ root_weight.T
            grad: Tensor | None = None
            for s in members:
                is_live = live_here[chunk_rows, s]
                picked = is_live.nonzero().squeeze(1)
                if picked.numel() == 0:
                    continue
                has_all_rows = picked.numel() == chunk_rows.numel()
                at_rows = chunk_rows[picked]
                columns = local_columns(root, scopes[s])
                mine = _columns(logits, columns)
                mine = mine if has_all_rows else mine[picked]
                if stream_bias[s] is not None:
                    mine = mine + _columns(stream_bias[s][None], columns)  # type: ignore[index]
                target = local_targets(targets[at_rows, s], scopes[s])
                coef = inputs.coef_loss[at_rows, s].to(dtype)
                coef_n = None if coef_nll is None else coef_nll[at_rows, s].to(dtype)
                loss, nll, entropy, is_correct, dlogits = _stream_pass(
                    mine, target, coef, coef_n, inputs, want_grad
                )
                stream_loss[s] += (loss * coef).sum()
                stream_correct[s] += is_correct.sum()
                if token_nll is not None:
                    token_nll[at_rows, s] = nll
                if token_entropy is not None:
                    token_entropy[at_rows, s] = entropy
                if dlogits is None:
                    continue
                sums = dlogits.sum(dim=0)
                if grad is None and has_all_rows and dlogits.shape == logits.shape:
                    grad = dlogits
                    column_sums[s] += sums
                    continue
                if grad is None:
                    grad = torch.zeros_like(logits)
                base = 0
                for column in columns:
                    width = column.stop - column.start
                    part = dlogits[:, base : base + width]
                    if has_all_rows:
                        grad[:, column] += part
                    else:
                        grad[:, column].index_add_(0, picked, part)
                    column_sums[s][column] += sums[base : base + width]
                    base += width
            if grad is not None and grad_root is not None:
                result.grad_hidden.index_add_(0, chunk_rows, grad @ root_weight)  # type: ignore[union-attr]
                grad_root.addmm_(grad.T, hidden_rows)
        if grad_root is not None:
            _add_root_gradients(result, grad_root, column_sums, root, root_weight, embed_f)
    return result


def _parts(inputs: LossInputs) -> Iterator[tuple[Scopes, Tensor, tuple[Interval, ...], list[int]]]:
    """``(scopes, live targets, root, members)`` of every product."""
    for kind, scopes in enumerate(inputs.sets):
        for root, members in group_streams(scopes):
            yield scopes, inputs.live_of(kind), root, members


def _add_root_gradients(
    result: LossResult,
    grad_root: Tensor,
    column_sums: dict[int, Tensor],
    root: Sequence[Interval],
    root_weight: Tensor,
    embed: Tensor | None,
) -> None:
    """Add the gradients of stream embeddings and bias, dW's rank-one terms, and the root's dW to its rows."""
    for s, sums in column_sums.items():
        if embed is not None:
            grad_root.addr_(sums, embed[s])
            result.grad_embed[s] += sums @ root_weight  # type: ignore[index]
    base = 0
    for interval in root:
        rows, width = slice(interval.row, interval.row + interval.num_ids), interval.num_ids
        result.grad_weight[rows] += grad_root[base : base + width]  # type: ignore[index]
        if result.grad_bias is not None:
            for sums in column_sums.values():
                result.grad_bias[rows] += sums[base : base + width]
        base += width
