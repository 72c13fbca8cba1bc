"""multistream_logprobs: what multistream_loss knows of each token, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import check, describe
from speechlm_ext.ops.multistream_loss.arguments import Heads, check_arguments
from speechlm_ext.ops.multistream_loss.op import LossSettings
from speechlm_ext.ops.multistream_loss.scopes import GivenScopes


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
    """Log-probabilities of targets and the entropies of their softmaxes, for scoring: no gradients, one product.

    Args:
        mask: bool ``[N, S]``, which targets are asked for; None for all. The others' ids may be anything.
        hidden, weight, targets, scopes, row_scope, heads, stream_embed, bias, softcap, chunk_bytes: as in
            `multistream_loss`.

    Returns:
        ``(logprobs, entropy)``, both float32 ``[N, S]`` (float64 for float64 input) in nats, 0 where not asked for.

    Raises:
        OpError: as `multistream_loss`; a mask that is not bool ``[N, S]``.
    """
    check(
        targets.dim() == 2,
        f"multistream_logprobs: targets must be int32 or int64 [N, S]; got {describe(targets)}",
    )
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    check(
        mask.dtype == torch.bool and mask.shape == targets.shape,
        f"multistream_logprobs: mask must be bool {list(targets.shape)} like targets; got {describe(mask)}",
    )
    ones = mask.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    sets = check_arguments(
        hidden, weight, targets, ones, scopes, row_scope, heads, stream_embed, bias, softcap
    )
    settings = LossSettings(sets, 0.0, 0.0, float(softcap or 0), chunk_bytes or 0)
    with torch.no_grad():
        _, _, nll, entropy = torch.ops.speechlm_ext.multistream_loss(
            hidden, weight, targets.to(torch.int64), mask, ones, None,
            None if row_scope is None else row_scope.to(torch.int64), stream_embed, bias, *settings, [False] * 4, True,
            True, True,
        )  # fmt: skip
    return 0 - nll, entropy
