"""torch.library registration of multistream_loss, and its autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY
from speechlm_ext.ops.multistream_loss.chunks import capturing, native_pass
from speechlm_ext.ops.multistream_loss.scopes import check_values, unflatten
from speechlm_ext.ops.multistream_loss.types import LossOptions

LIBRARY.define(
    "multistream_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor live, Tensor coef, Tensor? coef_nll, "
    "Tensor? row_scope, Tensor? stream_embed, Tensor? bias, int[] scopes, float z_loss, float label_smoothing, "
    "float softcap, int chunk_bytes, bool[] wants, bool want_tokens, bool want_entropy, bool check) -> Tensor[]"
)


def _op(  # type: ignore[no-untyped-def]
    hidden, weight, targets, live, coef, coef_nll, row_scope, stream_embed, bias, scopes, z_loss, label_smoothing,
    softcap, chunk_bytes, wants, want_tokens, want_entropy, check,
):  # fmt: skip
    sets = unflatten(scopes, targets.shape[1])
    if check and not capturing(hidden):
        check_values(targets, coef, live, row_scope, sets)
    options = LossOptions(z_loss, label_smoothing, softcap or None)
    with torch.autocast(hidden.device.type, enabled=False):
        result = native_pass(
            hidden, weight, targets, live, coef, coef_nll, row_scope, sets, stream_embed, bias, options, any(wants),
            want_tokens, want_entropy, chunk_bytes or None, wants,
        )  # fmt: skip
    return [value for value in vars(result).values() if value is not None]


LIBRARY.impl("multistream_loss", _op, "CPU")
LIBRARY.impl("multistream_loss", _op, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_loss", lib=LIBRARY)
def _fake(  # type: ignore[no-untyped-def]
    hidden, weight, targets, live, coef, coef_nll, row_scope, stream_embed, bias, scopes, z_loss, label_smoothing,
    softcap, chunk_bytes, wants, want_tokens, want_entropy, check,
):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    S = targets.shape[1]
    out = [hidden.new_empty(S, dtype=dtype), hidden.new_empty(S, dtype=torch.int64)]
    out += [hidden.new_empty(targets.shape, dtype=dtype) for _ in range(want_tokens + want_entropy)]
    given = zip(wants, (hidden, weight, stream_embed, bias), strict=True)
    return out + [t.new_empty(t.shape, dtype=dtype) for wanted, t in given if wanted and t is not None]


class LossSettings(NamedTuple):
    """What the op is told beside tensors, in the order of its schema."""

    scopes: list[int]
    z_loss: float
    label_smoothing: float
    softcap: float
    chunk_bytes: int


class MultiStreamLossFunction(torch.autograd.Function):
    """``(loss_sum, stream_loss, stream_correct, token_nll or empty, token_entropy or empty)``.

    Gradients flow through loss_sum and token_nll. They are computed in forward and only scaled in backward; with
    ``recompute`` the logits are computed again in backward, which ``per_token`` always needs, because the gradient of
    each token is not known before.
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
        row_scope,
        settings,
        per_token,
        want_entropy,
        recompute,
        want_grad,
    ):
        wants = [want_grad and needed for needed in ctx.needs_input_grad[:4]]
        later = per_token or recompute
        stream_loss, stream_correct, *rest = torch.ops.speechlm_ext.multistream_loss(
            hidden, weight, targets, live, loss_weight, None, row_scope, stream_embed, bias, *settings,
            [False] * 4 if later else wants, per_token, want_entropy, True,
        )  # fmt: skip
        loss_sum = stream_loss.sum()
        token_nll = rest.pop(0) if per_token else loss_sum.new_empty(0)
        token_entropy = rest.pop(0) if want_entropy else loss_sum.new_empty(0)
        ctx.per_token, ctx.settings = per_token, settings
        ctx.wants = wants
        given = zip(wants, (hidden, weight, stream_embed, bias), strict=True)
        ctx.dtypes = [t.dtype if wanted and t is not None else None for wanted, t in given]
        ctx.gradients, ctx.from_inputs = None, later or not torch.compiler.is_compiling()
        if any(wants) and ctx.from_inputs:
            ctx.save_for_backward(hidden, weight, stream_embed, bias, targets, live, loss_weight, row_scope)
            ctx.gradients = None if later else rest
        elif any(wants):
            ctx.save_for_backward(*rest)
        ctx.mark_non_differentiable(stream_loss, stream_correct, token_entropy)
        return loss_sum, stream_loss, stream_correct, token_nll, token_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _grad_stream, _grad_correct, grad_nll, _grad_entropy):  # type: ignore[override]
        if ctx.gradients is not None:
            # Scaled where they lie and handed out: a second copy of a large table's gradient would be the op's largest
            # tensor. Whoever goes back a second time (retain_graph) gets them computed again.
            gradients, ctx.gradients = ctx.gradients, None
            torch._foreach_mul_(gradients, grad_sum)
        elif ctx.from_inputs:
            hidden, weight, stream_embed, bias, targets, live, loss_weight, row_scope = ctx.saved_tensors
            _, _, *gradients = torch.ops.speechlm_ext.multistream_loss(
                hidden, weight, targets, live, loss_weight * grad_sum, grad_nll if ctx.per_token else None,
                row_scope, stream_embed, bias, *ctx.settings, ctx.wants, False, False, False,
            )  # fmt: skip
        else:
            gradients = [g * grad_sum for g in ctx.saved_tensors]
        return (*_rounded(gradients, ctx.dtypes), *[None] * 9)


def _rounded(gradients: list[Tensor], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Each gradient at its place, rounded to its input's dtype at the very end. Empties the list: a gradient that
    nobody else holds becomes ``.grad`` without being copied."""
    gradients.reverse()
    return [None if dtype is None else gradients.pop().to(dtype) for dtype in dtypes]
