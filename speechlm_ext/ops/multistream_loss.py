"""multistream_loss: the output layer and cross-entropy of all streams at once, weighted per token.

Never holds ``[N, S, V]`` or ``[N, S, D]``. The weights are an input and are folded into the logit gradients, so the
caller chooses the normaliser: divide ``loss_sum`` by what suits (tokens, frames, the sum of weights over all ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops._multistream_loss_op import MultiStreamLossFunction, Scopes, flatten_scopes
from speechlm_ext.ops._native import check, describe, partition_hint
from speechlm_ext.ops.reference.multistream_loss import LossOptions, merge_intervals


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


def multistream_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    scopes: Sequence[Sequence[tuple[int, int]]],
    stream_embed: Tensor | None = None,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> MultiStreamLoss:
    """Linear layer and weighted cross-entropy over S streams.

    The logits of row n and stream s are ``(hidden[n] + stream_embed[s]) @ weight[scope_s].T + bias[scope_s]``, and its
    loss is the cross-entropy of ``targets[n, s]`` among them. Targets whose weight is 0 are skipped, whatever their
    id; only rows with live targets are computed.

    Args:
        hidden: ``[N, D]`` float.
        weight: ``[V, D]`` output table, the same dtype; differentiable, may be tied to the embedding.
        targets: int32 or int64 ``[N, S]``, e.g. ``PackedBatch.labels``.
        loss_weight: float ``[N, S]`` >= 0, e.g. ``PackedBatch.loss_weight``; carries no gradient.
        scopes: per stream the id intervals ``(start, end)`` that its softmax runs over.
        stream_embed: ``[S, D]`` added to the hidden state of each stream; None for none.
        bias: ``[V]``; None for none.
        z_loss: adds ``z_loss · logsumexp²`` to each token's loss.
        label_smoothing: share of the target spread evenly over the scope, in [0, 1).
        softcap: logits become ``softcap · tanh(logits / softcap)``.
        reduction: ``"sum"``, or ``"none"`` for ``token_nll`` as well (differentiable; recomputes in backward).

    Returns:
        `MultiStreamLoss`. With no live target all sums are 0 and gradients are zero, not absent.

    Raises:
        OpError: (a ValueError) for shapes that do not fit, an empty, overlapping or out-of-range scope, a negative or
            not finite weight, or a live target outside its stream's scope (row, stream and id are named).
    """
    merged = _check_arguments(hidden, weight, targets, loss_weight, scopes, stream_embed, bias)
    check(z_loss >= 0, f"multistream_loss: z_loss must be 0 or more; got {z_loss}")
    check(
        0 <= label_smoothing < 1,
        f"multistream_loss: label_smoothing must be in [0, 1); got {label_smoothing}",
    )
    check(softcap is None or softcap > 0, f"multistream_loss: softcap must be above 0; got {softcap}")
    check(
        reduction in ("sum", "none"),
        f'multistream_loss: reduction must be "sum" or "none"; got {reduction!r}',
    )
    targets = targets.to(torch.int64)
    loss_weight = loss_weight.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    live = loss_weight > 0
    options = LossOptions(float(z_loss), float(label_smoothing), None if softcap is None else float(softcap))
    loss_sum, stream_loss, token_nll, stream_correct = MultiStreamLossFunction.apply(
        hidden, weight, stream_embed, bias, targets, live, loss_weight, flatten_scopes(merged), options,
        reduction == "none", torch.is_grad_enabled(),
    )  # fmt: skip
    return MultiStreamLoss(
        loss_sum=loss_sum,
        stream_loss=stream_loss,
        stream_count=live.sum(dim=0),
        stream_weight=loss_weight.sum(dim=0).float(),
        stream_correct=stream_correct,
        token_nll=token_nll if reduction == "none" else None,
    )


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    scopes: Sequence[Sequence[tuple[int, int]]],
    stream_embed: Tensor | None,
    bias: Tensor | None,
) -> Scopes:
    """Checks shapes and gives each stream's scope as merged intervals."""
    op = "multistream_loss"
    check(
        hidden.dim() == 2 and hidden.is_floating_point(),
        f"{op}: hidden must be float [N, D]; got {describe(hidden)}",
    )
    num_rows, width = hidden.shape
    check(
        weight.dim() == 2 and weight.shape[1] == width and weight.is_floating_point(),
        f"{op}: weight must be float [V, {width}] to fit hidden; got {describe(weight)}"
        + partition_hint(weight),
    )
    num_streams = len(scopes)
    check(
        tuple(targets.shape) == (num_rows, num_streams) and targets.dtype in (torch.int32, torch.int64),
        f"{op}: targets must be int32 or int64 [{num_rows}, {num_streams}] (hidden's rows, one column per scope); "
        f"got {describe(targets)}",
    )
    check(
        loss_weight.shape == targets.shape and loss_weight.is_floating_point(),
        f"{op}: loss_weight must be float {list(targets.shape)} like targets; got {describe(loss_weight)}",
    )
    if stream_embed is not None:
        check(
            tuple(stream_embed.shape) == (num_streams, width),
            f"{op}: stream_embed must be [{num_streams}, {width}]; got {describe(stream_embed)}",
        )
    vocab = weight.shape[0]
    if bias is not None:
        check(tuple(bias.shape) == (vocab,), f"{op}: bias must be [{vocab}]; got {describe(bias)}")
    merged = []
    for s, scope in enumerate(scopes):
        intervals = [(int(start), int(end)) for start, end in scope]
        check(len(intervals) > 0, f"{op}: scopes[{s}] is empty")
        for start, end in intervals:
            check(
                0 <= start < end <= vocab,
                f"{op}: scopes[{s}] has ({start}, {end}), which is no interval of the {vocab} ids of weight",
            )
        ordered = sorted(intervals)
        for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False):
            check(end <= start, f"{op}: the intervals of scopes[{s}] overlap: {ordered}")
        merged.append(merge_intervals(ordered))
    return tuple(merged)
