"""multistream_loss: the output layer and cross-entropy of all streams at once, weighted per token.

``[N, S, V]`` and ``[N, S, D]`` are never materialized. The weights are an input and are folded into the logit
gradients, so the caller chooses the normalizer of ``loss_sum``: tokens, frames, the sum of weights over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe
from speechlm_ext.ops.multistream_loss.arguments import Heads, read_chunk_bytes, read_inputs
from speechlm_ext.ops.multistream_loss.op import LossCall, MultiStreamLossFunction, run_op
from speechlm_ext.ops.multistream_loss.rows import LossRows
from speechlm_ext.ops.multistream_loss.scopes import GivenScopes
from speechlm_ext.ops.multistream_loss.types import LossWants, sum_dtype


class MultiStreamLoss(NamedTuple):
    """Sums over the block; only ``loss_sum`` and ``token_nll`` carry gradients.

    A named tuple because engines that partition parameters (DeepSpeed's ZeRO 3) find tensors of a module's output in
    tuples, but not in other classes.
    """

    loss_sum: Tensor
    """Scalar, Σ weight · loss over all streams, in float32 (float64 for float64 input)."""
    stream_loss: Tensor
    """``[S]``: the same sum per stream."""
    stream_count: Tensor
    """int64 ``[S]``: number of live targets (weight > 0)."""
    stream_weight: Tensor
    """float32 ``[S]``: sum of their weights."""
    stream_correct: Tensor
    """int64 ``[S]``: number of live targets that are the most likely id of their scope."""
    token_nll: Tensor | None = None
    """``[N, S]``: unweighted -log p(target) without smoothing and z-loss, 0 where not live; None unless
    ``reduction="none"``."""
    stream_entropy: Tensor | None = None
    """``[S]``: sum of the entropies, in nats, of the live targets' softmaxes; None unless ``entropy=True``. Divide by
    ``stream_count`` for the mean."""


def multistream_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    scopes: GivenScopes | Sequence[GivenScopes],
    row_scope: Tensor | None = None,
    heads: Heads = "shared",
    stream_embed: Tensor | None = None,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["sum", "none"] = "sum",
    entropy: bool = False,
    recompute: bool = False,
    chunk_bytes: int | None = None,
    rows: LossRows | None = None,
    check_values: bool = True,
) -> MultiStreamLoss:
    """Linear layer and weighted cross-entropy over S streams.

    The logits of row n and stream s are ``(hidden[n] + stream_embed[s]) @ weight[scope_s].T + bias[scope_s]``, and its
    loss is the cross-entropy of ``targets[n, s]`` among them. Targets of weight 0 are skipped, whatever their id; only
    rows with live targets are computed.

    Args:
        hidden: ``[N, D]`` float.
        weight: ``[V, D]`` output table; differentiable, may be tied to the embedding. On a GPU, if hidden and weight
            are bfloat16, products run in bfloat16; otherwise in float32 (float64 for float64 hidden). Under
            ``torch.autocast`` to bfloat16 their factors are rounded to it, as those of `F.linear` are.
        targets: int32 or int64 ``[N, S]``, e.g. ``PackedBatch.labels``.
        loss_weight: float ``[N, S]`` >= 0, e.g. ``PackedBatch.loss_weight``; carries no gradient.
        scopes: per stream the id intervals ``(start, end)`` that its softmax runs over. With ``row_scope``, a list of
            such scopes, one for each kind of row.
        row_scope: int32 or int64 ``[N]``, index into ``scopes`` of each row (e.g. speech or text); None with one set.
        heads: ``"shared"``: row i of ``weight`` is id i, for all streams. ``"separate"``: each stream has its own rows;
            ``weight`` (and ``bias``) hold the ids of stream 0's scope in ascending order, then those of stream 1, …
            (`separate_head_rows` in all). Targets and scopes are ids in either case.
        stream_embed: ``[S, D]``, added to the hidden state of each stream; ``[S - 1, D]`` where stream 0 has none, and
            takes no arithmetic for it; None for none.
        bias: ``[V]``; None for none.
        z_loss: adds ``z_loss · logsumexp²`` to each token's loss (PaLM, Chowdhery et al. 2022).
        label_smoothing: share of the target spread evenly over the scope, in [0, 1).
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2, 2024); None for off.
        reduction: ``"sum"``, or ``"none"`` for ``token_nll`` as well (differentiable; recomputes in backward).
        entropy: whether to compute ``stream_entropy``, at the cost of one more pass of exponentials.
        recompute: compute gradients in backward instead of forward: four products instead of three, and no gradients
            are held between the two.
        chunk_bytes: bytes of logits held at a time, but at least 512 rows; None for 64 MiB on the CPU and 384 MiB on a
            GPU; on one of 36 GiB or more, 1 GiB if that holds all rows of a product, else 512 MiB.
        rows: the rows to compute, from `plan_loss_rows`; None: found here, which on a GPU synchronizes. Rows of another
            batch, or planned for other kinds of rows, make the loss NaN.
        check_values: whether values in the tensors are checked first, which on a GPU synchronizes. Without it a live
            target outside its stream's scope makes the loss NaN, and a target of negative or NaN weight is ignored.

    Returns:
        `MultiStreamLoss`. With no live target all sums are 0 and gradients are zero, not absent.

    Raises:
        OpError: (a ValueError) shapes or dtypes that do not fit; an empty, overlapping or out-of-range scope; a
            ``row_scope`` out of range; more than 64 streams; an option out of range; a negative or non-finite weight; a
            live target outside its stream's scope (the message names row, stream and id).
    """
    inputs = read_inputs(
        hidden,
        weight,
        targets,
        loss_weight,
        scopes=scopes,
        row_scope=row_scope,
        heads=heads,
        stream_embed=stream_embed,
        bias=bias,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
        rows=rows,
    )
    if reduction not in ("sum", "none"):
        raise OpError(f'multistream_loss: reduction must be "sum" or "none"; got {reduction!r}')
    call = LossCall(
        per_token=reduction == "none",
        entropy=entropy,
        recompute=recompute,
        grad_enabled=torch.is_grad_enabled(),
        chunk_bytes=read_chunk_bytes(chunk_bytes),
        check_values=check_values,
    )
    outputs = MultiStreamLossFunction.apply(*inputs, call)
    loss_sum, stream_loss, stream_counts, token_nll, token_entropy = outputs
    stream_correct, stream_count = stream_counts.unbind()
    return MultiStreamLoss(
        loss_sum=loss_sum,
        stream_loss=stream_loss,
        stream_count=stream_count,
        stream_weight=inputs.coef_loss.sum(dim=0).float(),
        stream_correct=stream_correct,
        token_nll=token_nll if call.per_token else None,
        stream_entropy=token_entropy.sum(dim=0) if entropy else None,
    )


def multistream_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    scopes: GivenScopes | Sequence[GivenScopes],
    row_scope: Tensor | None = None,
    heads: Heads = "shared",
    stream_embed: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and entropies of their softmaxes, for scoring: no gradients, one product.

    Args:
        mask: bool ``[N, S]``, the targets to score; None for all. The others' ids are not read.
        hidden, weight, targets, scopes, row_scope, heads, stream_embed, bias, softcap, chunk_bytes: as in
            `multistream_loss`.

    Returns:
        ``(logprobs, entropy)``, both float32 ``[N, S]`` (float64 for float64 input) in nats, 0 where masked out.

    Raises:
        OpError: (a ValueError) as `multistream_loss`; a mask that is not bool ``[N, S]``.
    """
    if targets.dim() != 2:
        raise OpError(f"multistream_logprobs: targets must be int32 or int64 [N, S]; got {describe(targets)}")
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != targets.shape:
        raise OpError(
            f"multistream_logprobs: mask must be bool {list(targets.shape)} like targets; got {describe(mask)}"
        )
    inputs = read_inputs(
        hidden,
        weight,
        targets,
        mask.to(sum_dtype(hidden.dtype)),
        scopes=scopes,
        row_scope=row_scope,
        heads=heads,
        stream_embed=stream_embed,
        bias=bias,
        softcap=softcap,
    )
    wants = LossWants([False] * 4, token_nll=True, token_entropy=True)
    with torch.no_grad():
        _, _, nll, entropy = run_op(inputs, wants, read_chunk_bytes(chunk_bytes))
    return 0 - nll, entropy
