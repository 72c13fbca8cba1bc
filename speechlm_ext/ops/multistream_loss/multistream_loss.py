"""multistream_loss: the output layer and cross-entropy of all streams at once, weighted per token.

Never holds ``[N, S, V]`` or ``[N, S, D]``. The weights are an input and are folded into the logit gradients, so the
caller chooses the normaliser: divide ``loss_sum`` by what suits (tokens, frames, the sum of weights over all ranks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import check
from speechlm_ext.ops.multistream_loss.arguments import Heads, check_arguments
from speechlm_ext.ops.multistream_loss.op import LossSettings, MultiStreamLossFunction
from speechlm_ext.ops.multistream_loss.scopes import GivenScopes


class MultiStreamLoss(NamedTuple):
    """Sums over the block; only ``loss_sum`` and ``token_nll`` carry gradients.

    A named tuple because engines that partition parameters (DeepSpeed's ZeRO 3) look for tensors in a module's outputs
    and find them in tuples, not in other classes.
    """

    loss_sum: Tensor
    """Scalar, Σ weight · loss over all streams, in float32 (float64 for float64 input)."""
    stream_loss: Tensor
    """``[S]`` the same sum per stream; adds up to ``loss_sum``."""
    stream_count: Tensor
    """``[S]`` int64 number of live targets (weight > 0)."""
    stream_weight: Tensor
    """``[S]`` float32 sum of their weights."""
    stream_correct: Tensor
    """``[S]`` int64 number of live targets that are the most likely id of their scope."""
    token_nll: Tensor | None = None
    """``[N, S]`` unweighted -log p(target), without smoothing and z-loss, 0 where not live; only with
    ``reduction="none"``."""
    stream_entropy: Tensor | None = None
    """``[S]`` entropies in nats of the softmaxes of live targets, summed; only with ``entropy=True``. Divide by
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
) -> MultiStreamLoss:
    """Linear layer and weighted cross-entropy over S streams.

    The logits of row n and stream s are ``(hidden[n] + stream_embed[s]) @ weight[scope_s].T + bias[scope_s]``, and its
    loss is the cross-entropy of ``targets[n, s]`` among them. Targets whose weight is 0 are skipped, whatever their
    id; only rows with live targets are computed.

    Args:
        hidden: ``[N, D]`` float.
        weight: ``[V, D]`` output table; differentiable, may be tied to the embedding. In bfloat16 like hidden the
            products on a GPU run in bfloat16; in any other case they run in float32.
        targets: int32 or int64 ``[N, S]``, e.g. ``PackedBatch.labels``.
        loss_weight: float ``[N, S]`` >= 0, e.g. ``PackedBatch.loss_weight``; carries no gradient.
        scopes: per stream the id intervals ``(start, end)`` that its softmax runs over. With ``row_scope``, a list of
            such scopes, one for each kind of row.
        row_scope: int ``[N]``, which of ``scopes`` each row uses (e.g. speech or text); None when all use the same.
        heads: ``"shared"``: row i of ``weight`` belongs to id i, for all streams. ``"separate"``: each stream has rows
            of its own; ``weight`` (and ``bias``) hold the ids of stream 0's scope in ascending order, then those of
            stream 1, … (`separate_head_rows` in all). Targets and scopes are ids as before.
        stream_embed: ``[S, D]`` added to the hidden state of each stream; None for none.
        bias: ``[V]``; None for none.
        z_loss: adds ``z_loss · logsumexp²`` to each token's loss.
        label_smoothing: share of the target spread evenly over the scope, in [0, 1).
        softcap: logits become ``softcap · tanh(logits / softcap)``.
        reduction: ``"sum"``, or ``"none"`` for ``token_nll`` as well (differentiable; recomputes in backward).
        entropy: whether to give ``stream_entropy``, for one more pass of exponentials.
        recompute: compute no gradients in forward but everything in backward: one product more (four instead of
            three), and nothing is held between the two.
        chunk_bytes: bytes of logits held at a time, though never less than 512 rows; None for 64 MiB on the CPU and
            384 MiB on a GPU.

    Returns:
        `MultiStreamLoss`. With no live target all sums are 0 and gradients are zero, not absent.

    Raises:
        OpError: (a ValueError) for shapes that do not fit, an empty, overlapping or out-of-range scope, a kind of row
            that has no scopes, more than 64 streams, a negative or not finite weight, or a live target outside its
            stream's scope (row, stream and id are named).
    """
    sets = check_arguments(
        hidden, weight, targets, loss_weight, scopes, row_scope, heads, stream_embed, bias, softcap
    )
    check(
        0 <= z_loss < math.inf,
        lambda: f"multistream_loss: z_loss must be 0 or more and finite; got {z_loss}",
    )
    check(
        0 <= label_smoothing < 1,
        lambda: f"multistream_loss: label_smoothing must be in [0, 1); got {label_smoothing}",
    )
    check(
        reduction in ("sum", "none"),
        lambda: f'multistream_loss: reduction must be "sum" or "none"; got {reduction!r}',
    )
    check(
        chunk_bytes is None or (isinstance(chunk_bytes, int) and chunk_bytes > 0),
        lambda: f"multistream_loss: chunk_bytes must be an int above 0; got {chunk_bytes!r}",
    )
    targets = targets.to(torch.int64)
    row_scope = None if row_scope is None else row_scope.to(torch.int64)
    loss_weight = loss_weight.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    live = loss_weight > 0
    settings = LossSettings(
        sets, float(z_loss), float(label_smoothing), float(softcap or 0), chunk_bytes or 0
    )
    loss_sum, stream_loss, stream_correct, token_nll, token_entropy = MultiStreamLossFunction.apply(
        hidden, weight, stream_embed, bias, targets, live, loss_weight, row_scope, settings, reduction == "none",
        entropy, recompute, torch.is_grad_enabled(),
    )  # fmt: skip
    return MultiStreamLoss(
        loss_sum=loss_sum,
        stream_loss=stream_loss,
        stream_count=live.sum(dim=0),
        stream_weight=loss_weight.sum(dim=0).float(),
        stream_correct=stream_correct,
        token_nll=token_nll if reduction == "none" else None,
        stream_entropy=token_entropy.sum(dim=0) if entropy else None,
    )
