"""torch.library registration of multistream_loss, and its autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import LIBRARY
from speechlm_ext.ops.multistream_loss.arguments import check_values
from speechlm_ext.ops.multistream_loss.chunks import capturing, loss_pass
from speechlm_ext.ops.multistream_loss.types import (
    LossInputs,
    LossWants,
    product_gradient_dtype,
    sum_dtype,
)

#: The fields of LossInputs, then those of LossWants, then `_op`'s own.
LIBRARY.define(
    "multistream_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor live, Tensor coef_loss, int[] scopes, "
    "Tensor? coef_nll, Tensor? row_scope, Tensor? stream_embed, Tensor? bias, float z_loss, float label_smoothing, "
    "float softcap, Tensor? rows, int[] row_counts, bool narrow, bool[] gradients, "
    "bool token_nll, bool token_entropy, int chunk_bytes, bool check) -> Tensor[]"
)
_OP = torch.ops.speechlm_ext.multistream_loss
#: Inputs with gradients, in the order of `LossWants.gradients` and of the results.
_DIFFERENTIABLE = ("hidden", "weight", "stream_embed", "bias")


def run_op(inputs: LossInputs, wants: LossWants, chunk_bytes: int, check: bool = True) -> list[Tensor]:
    """The values of `LossResult` that are not None; ``check``: whether values in the tensors are checked first."""
    return _OP(*inputs, *wants, chunk_bytes, check)  # type: ignore[no-any-return]


def _split(arguments: tuple[Any, ...]) -> tuple[LossInputs, LossWants, int, bool]:
    *fields, gradients, token_nll, token_entropy, chunk_bytes, check = arguments
    return LossInputs(*fields), LossWants(gradients, token_nll, token_entropy), chunk_bytes, check


def _op(*arguments: Any) -> list[Tensor]:
    inputs, wants, chunk_bytes, check = _split(arguments)
    if check and not capturing(inputs.hidden):
        check_values(inputs)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        result = loss_pass(inputs, wants, chunk_bytes)
    return [value for value in vars(result).values() if value is not None]


LIBRARY.impl("multistream_loss", _op, "CPU")
LIBRARY.impl("multistream_loss", _op, "CUDA")


@torch.library.register_fake("speechlm_ext::multistream_loss", lib=LIBRARY)
def _fake(*arguments: Any) -> list[Tensor]:
    inputs, wants, _, _ = _split(arguments)
    new, S = inputs.hidden.new_empty, inputs.targets.shape[1]
    dtype = sum_dtype(inputs.hidden.dtype)
    out = [new(S, dtype=dtype), new(2, S, dtype=torch.int64)]
    out += [new(inputs.targets.shape, dtype=dtype) for _ in range(wants.token_nll + wants.token_entropy)]
    of_products = product_gradient_dtype(inputs.hidden, inputs.weight)
    dtypes = [of_products, of_products, dtype, dtype]
    learned = zip(wants.gradients, _differentiable(inputs), dtypes, strict=True)
    return out + [t.new_empty(t.shape, dtype=of) for wanted, t, of in learned if wanted and t is not None]


def _differentiable(inputs: LossInputs) -> list[Tensor | None]:
    return [inputs.hidden, inputs.weight, inputs.stream_embed, inputs.bias]


class LossCall(NamedTuple):
    """Settings of `MultiStreamLossFunction`."""

    per_token: bool
    """Whether ``token_nll`` is returned, and is differentiable."""
    entropy: bool
    recompute: bool
    grad_enabled: bool
    chunk_bytes: int
    check_values: bool


class MultiStreamLossFunction(torch.autograd.Function):
    """``(loss_sum, stream_loss, stream_counts, token_nll or empty, token_entropy or empty)``.

    Takes the fields of `LossInputs` and a `LossCall`. Gradients flow through loss_sum and token_nll. They are computed
    in forward and only scaled in backward; with ``recompute`` the logits are computed again in backward. ``per_token``
    always recomputes, because the gradient of each token is not known in forward.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        *fields, call = arguments
        inputs = LossInputs(*fields)
        gradients = [
            call.grad_enabled and ctx.needs_input_grad[LossInputs._fields.index(name)]
            for name in _DIFFERENTIABLE
        ]
        later = call.per_token or call.recompute
        wants = LossWants([False] * 4 if later else gradients, call.per_token, call.entropy)
        stream_loss, stream_counts, *rest = run_op(inputs, wants, call.chunk_bytes, call.check_values)
        loss_sum = stream_loss.sum()
        token_nll = rest.pop(0) if call.per_token else loss_sum.new_empty(0)
        token_entropy = rest.pop(0) if call.entropy else loss_sum.new_empty(0)
        learned = zip(gradients, _differentiable(inputs), strict=True)
        ctx.dtypes = [t.dtype if wanted and t is not None else None for wanted, t in learned]
        ctx.call, ctx.wants = call, gradients
        ctx.gradients, ctx.from_inputs = None, later or not torch.compiler.is_compiling()
        if any(gradients) and ctx.from_inputs:
            ctx.save_for_backward(*[field if isinstance(field, Tensor) else None for field in fields])
            ctx.settings = [None if isinstance(field, Tensor) else field for field in fields]
            ctx.gradients = None if later else rest
        elif any(gradients):
            ctx.save_for_backward(*rest)
        ctx.mark_non_differentiable(stream_loss, stream_counts, token_entropy)
        return loss_sum, stream_loss, stream_counts, token_nll, token_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_sum, _, _, grad_nll, _ = grads
        if ctx.gradients is not None:
            # Scaled in place and handed out: a second copy of a large table's gradient would be the op's largest
            # tensor. A second backward (retain_graph) computes them again.
            gradients, ctx.gradients = ctx.gradients, None
            torch._foreach_mul_(gradients, grad_sum)
        elif ctx.from_inputs:
            fields = zip(ctx.saved_tensors, ctx.settings, strict=True)
            inputs = LossInputs(*[setting if saved is None else saved for saved, setting in fields])
            inputs = inputs._replace(
                coef_loss=inputs.coef_loss * grad_sum, coef_nll=grad_nll if ctx.call.per_token else None
            )
            _, _, *gradients = run_op(inputs, LossWants(ctx.wants), ctx.call.chunk_bytes, check=False)
        else:
            gradients = [g * grad_sum for g in ctx.saved_tensors]
        by_name = dict(zip(_DIFFERENTIABLE, _rounded(gradients, ctx.dtypes), strict=True))
        return (*[by_name.get(name) for name in LossInputs._fields], None)


def _rounded(gradients: list[Tensor], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Each gradient in its input's dtype, None where there is none.

    Empties the list: a gradient without another reference becomes ``.grad`` without being copied.
    """
    gradients.reverse()
    return [None if dtype is None else gradients.pop().to(dtype) for dtype in dtypes]
