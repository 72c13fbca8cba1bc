"""Shortcuts around torch's dispatcher, for calls so short that it would be a fifth of them.

They use private functions of torch; `python_tests/ops/test_dispatch.py` checks that the installed torch has them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def can_skip_dispatcher(*tensors: Tensor) -> bool:
    """True for plain CPU tensors with no tracing, mode or functorch transform active.

    The dispatcher would then only pass the call on to the CPU implementation.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        all(type(t) is Tensor and t.device.type == "cpu" and not t.is_neg() for t in tensors)
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def below_autograd() -> AbstractContextManager[None]:
    """A context in which ops skip autograd's dispatch, as they would without gradients."""
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]
