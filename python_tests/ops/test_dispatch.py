"""The private functions of torch behind `ops.common.dispatch`, and when the dispatcher is skipped."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speechlm_ext.ops.common.dispatch import below_autograd, can_skip_dispatcher


def test_plain_cpu_tensors_skip_the_dispatcher():
    x = torch.zeros(2)
    assert can_skip_dispatcher(x, x) and can_skip_dispatcher()
    assert not can_skip_dispatcher(x, torch.nn.Parameter(x))
    assert not can_skip_dispatcher(x.to("meta"))
    assert not can_skip_dispatcher(torch.zeros(2, dtype=torch.complex64).conj().imag)  # negation is lazy


def test_modes_and_transforms_do_not():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen = []

    def look(x):
        seen.append(can_skip_dispatcher(torch.zeros(2)))
        return x

    with Mode():
        look(0)
    with torch.overrides.BaseTorchFunctionMode():
        look(0)
    torch.vmap(look)(torch.zeros(3))
    torch.jit.trace(look, torch.zeros(2), check_trace=False)
    assert seen == [False] * 4


def test_below_autograd_records_no_gradient():
    x = torch.zeros(2, requires_grad=True)
    with below_autograd():
        y = x * 2
    assert not y.requires_grad and (x * 2).requires_grad
