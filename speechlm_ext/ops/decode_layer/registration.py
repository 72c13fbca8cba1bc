"""What the ops of a decode layer share: their tensors' types, and the refusal of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from speechlm_ext.ops.common.native import OpError


def refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """Raise OpError where autograd would record a call, which has no backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise OpError(f"{op} has no gradients: call it under torch.inference_mode() or torch.no_grad()")
