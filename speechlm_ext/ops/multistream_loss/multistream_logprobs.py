"""multistream_logprobs: log-probability and entropy of each token, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError, describe
from speechlm_ext.ops.multistream_loss.arguments import Heads, read_chunk_bytes, read_inputs
from speechlm_ext.ops.multistream_loss.op import run_op
from speechlm_ext.ops.multistream_loss.scopes import GivenScopes
from speechlm_ext.ops.multistream_loss.types import LossWants, sum_dtype


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
