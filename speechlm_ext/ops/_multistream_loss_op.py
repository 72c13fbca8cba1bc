"""torch.library registration of multistream_loss, and its autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechlm_ext.ops._multistream_loss_pass import Scopes, native_pass
from speechlm_ext.ops._native import LIBRARY, OpError
from speechlm_ext.ops.reference.multistream_loss import LossOptions, local_targets, loss_pass


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
    """Each gradient at its place, rounded to its input's dtype at the very end. Empties the list: a gradient that
    nobody else holds becomes ``.grad`` without being copied."""
    gradients.reverse()
    return [None if dtype is None else gradients.pop().to(dtype) for dtype in dtypes]
