"""Calls whose launches and syncs on a GPU are known, and calls to compare with torch's fake CUDA tensors.

``python -m python_tests.cuda_on_cpu.launches.known_calls`` prints what the simulation counts, in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests.cuda_on_cpu.launches import model_cases
from python_tests.cuda_on_cpu.launches.recorder import Counts
from python_tests.cuda_on_cpu.launches.simulated_cuda import DEVICE, SimulatedRecorder, simulated_cuda

#: Name -> call of ``x`` float [2, 3], ``mask`` bool [2, 3], ``i`` int64 [2]; launches; syncs.
KNOWN: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], int, int]] = {
    "item": (lambda x, mask, i: x.sum().item(), 2, 1),
    "bool": (lambda x, mask, i: bool(mask.any()), 2, 1),
    "tolist": (lambda x, mask, i: i.tolist(), 1, 1),
    "cpu": (lambda x, mask, i: x.cpu(), 1, 1),
    "to cpu, other dtype": (lambda x, mask, i: x.to("cpu", torch.float64), 1, 1),
    "nonzero": (lambda x, mask, i: mask.nonzero(), 1, 1),
    "index by a mask": (lambda x, mask, i: x[mask], 2, 1),
    "index by a list": (lambda x, mask, i: x[[1, 0]], 2, 1),
    "index by a tensor": (lambda x, mask, i: x[i], 1, 0),
    "put a number by a mask": (lambda x, mask, i: x.__setitem__(mask, 0), 1, 0),
    "put a number by a tensor": (lambda x, mask, i: x.__setitem__(i, 0), 2, 1),
    "put a number in a slice": (lambda x, mask, i: x.__setitem__(slice(1), 0), 1, 0),
    "masked_select": (lambda x, mask, i: x.masked_select(mask), 1, 1),
    "unique": (lambda x, mask, i: i.unique(), 1, 1),
    "equal": (lambda x, mask, i: torch.equal(x, x), 1, 1),
    "repeat_interleave": (lambda x, mask, i: x.repeat_interleave(i + 1, 0), 3, 1),
    "tensor of a list": (lambda x, mask, i: torch.tensor([1, 2], device=x.device), 1, 1),
    "pageable copy": (lambda x, mask, i: torch.ones(2).to(x.device), 1, 1),
    "pinned copy": (lambda x, mask, i: torch.ones(2).pin_memory().to(x.device, non_blocking=True), 1, 0),
    "copy into": (lambda x, mask, i: x.copy_(torch.ones(2, 3)), 1, 1),
    "views": (lambda x, mask, i: x.T.unsqueeze(0).expand(4, 3, 2)[0].unbind(), 0, 0),
    "allocation": (lambda x, mask, i: (torch.empty_like(x), x.new_empty(3)), 0, 0),
    "empty result": (lambda x, mask, i: x[:0] + 1, 0, 0),
    "same dtype and device": (lambda x, mask, i: x.to(x.device, torch.float32).contiguous(), 0, 0),
    "where with a number": (lambda x, mask, i: torch.where(mask, x, 0.0), 2, 0),
    "linear": (lambda x, mask, i: F.linear(x, x), 1, 0),
}
#: Calls whose ops must be those of a fake CUDA tensor.
COMPARED: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "where": lambda x, mask, i: (torch.where(mask, x, 0.0), torch.where(mask, 1.0, 0.0)),
    "arithmetic": lambda x, mask, i: 1 - x / 2 + x**2,
    "norm": lambda x, mask, i: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "casts": lambda x, mask, i: x.to(torch.bfloat16).float().clamp(0, 1).softmax(-1),
    "new": lambda x, mask, i: torch.cat([x, x.new_zeros(1, 3), torch.full_like(x, 2)]),
    "tensor": lambda x, mask, i: torch.tensor([1, 2], device="cuda:0"),
    "order": lambda x, mask, i: (x.argsort(), x.topk(1), x.cumsum(0), x.median()),
    "reductions": lambda x, mask, i: (torch.linalg.vector_norm(x, dim=1), x.isfinite().all(), x.diff()),
    "linear": lambda x, mask, i: (F.silu(F.linear(x, x)), F.embedding(i, x), F.layer_norm(x, (3,))),
    "masks": lambda x, mask, i: (x.masked_fill(mask, 3.0), F.pad(x, (0, 1)), torch.isclose(x, x)),
}


def _arguments() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.ones(2, 3, device=DEVICE)
    return (
        x,
        torch.ones(2, 3, dtype=torch.bool, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )


class _Names(TorchDispatchMode):
    """The ops of fake tensors, which the mode below computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim" and func._schema.name != "aten::contiguous":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _SimulatedNames(SimulatedRecorder):
    def execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.names.append(func.name())
        return super().execute(func, args, kwargs)

    names: list[str]


def _ops(call: Callable[..., object]) -> dict[str, list[str]]:
    found = {}
    with FakeTensorMode():
        arguments = _arguments()
        with _Names() as fake:
            call(*arguments)
    found["fake"] = fake.names
    with simulated_cuda(), _SimulatedNames() as simulated:
        simulated.names = []
        arguments = _arguments()
        simulated.names.clear()
        call(*arguments)
    found["simulated"] = simulated.names
    return found


def _known(call: Callable[..., object]) -> list[int]:
    with simulated_cuda() as recorder:
        arguments = _arguments()
        recorder.counts = Counts()
        call(*arguments)
        return [recorder.counts.launches, recorder.counts.syncs.total()]


def _errors() -> dict[str, str]:
    """What a GPU refuses is refused here."""
    messages = {}
    with simulated_cuda():
        x = torch.ones(2, 3, device=DEVICE)
        for name, call in {"two devices": lambda: x + torch.ones(3), "numpy": lambda: x.numpy()}.items():
            try:
                call()
                messages[name] = "no error"
            except (RuntimeError, TypeError) as error:
                messages[name] = str(error)
    return messages


def _losses() -> dict[str, float]:
    """The loss of two training steps, on the CPU and on the simulated device."""
    found = {}
    for name, device in (("cpu", torch.device("cpu")), ("simulated", DEVICE)):
        with simulated_cuda():
            step = model_cases.train_step(device, 2)
            step()
            found[name] = float(step())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                "known": {name: _known(call) for name, (call, _, _) in KNOWN.items()},
                "ops": {name: _ops(call) for name, call in COMPARED.items()},
                "errors": _errors(),
                "losses": _losses(),
            }
        )
    )
