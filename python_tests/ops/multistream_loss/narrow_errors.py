"""Errors of multistream_loss with bfloat16 products, on simulated CUDA tensors: a process of its own for `test_narrow`.

``python -m python_tests.ops.multistream_loss.narrow_errors`` prints, for each case and result, the error relative to
float64 on the same rounded inputs.
"""

from __future__ import annotations

import json
from unittest import mock

import torch

from python_tests.cuda_on_cpu.launches.simulated_cuda import DEVICE, simulated_cuda
from speechlm_ext.ops.multistream_loss import chunks, op
from speechlm_ext.ops.multistream_loss.reference import loss_pass as reference
from speechlm_ext.ops.multistream_loss.scopes import flatten, read_scopes
from speechlm_ext.ops.multistream_loss.types import LossInputs, LossWants

#: Name -> factor of the hidden states, dtype of the parameters, number of rows of a chunk, a key of SCOPES. Without
#: hidden states the logits are those of the streams' vectors alone, and nothing hides an error of theirs.
CASES = {
    "bfloat16": (1, torch.bfloat16, 40, "one product"),
    "bfloat16, three chunks": (1, torch.bfloat16, 15, "one product"),
    "bfloat16, two products": (1, torch.bfloat16, 40, "two products"),
    "vectors": (0, torch.bfloat16, 40, "one product"),
    "vectors, float32 masters": (0, torch.float32, 40, "one product"),
    "vectors, float32 masters, three chunks": (0, torch.float32, 15, "one product"),
}
WANTS = LossWants([True] * 4)
#: Of the streams: in one product; and in two, whose gradients of the hidden states are added up.
SCOPES = {
    "one product": [[(0, 90)], [(20, 60)], [(20, 60)], [(61, 85)]],
    "two products": [[(0, 20)], [(20, 60)], [(20, 60)], [(61, 85)]],
}


def errors(scale: int, dtype: torch.dtype, chunk: int, scopes_of: str) -> dict[str, float]:
    """Relative errors by result."""
    S, D, N, scopes = 4, 24, 40, SCOPES[scopes_of]
    generator = torch.Generator().manual_seed(0)
    targets = torch.stack([torch.randint(a, b, (N,), generator=generator) for ((a, b),) in scopes], dim=1)
    weights = torch.rand(N, S, generator=generator)
    weights[::2, 1:] = 0
    shapes = {"hidden": (N, D), "weight": (90, D), "stream_embed": (S - 1, D), "bias": (90,)}
    given = {
        name: (torch.randn(shape, generator=generator) * (scale if name == "hidden" else 0.3)).to(dtype)
        for name, shape in shapes.items()
    }
    flat = flatten(read_scopes([scopes], 90, False)[0])
    options = dict(targets=targets, coef_loss=weights, live=weights > 0, scopes=flat)
    rounded = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in given.items()}
    want = reference(LossInputs(**{k: v.double() for k, v in rounded.items()}, **options), WANTS)  # type: ignore[arg-type]
    with simulated_cuda(), mock.patch.object(chunks, "MIN_ROWS", chunk):
        there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (given | options).items()}
        inputs = LossInputs(**there, narrow=dtype == torch.float32)
        got = {k: v.cpu() for k, v in vars(chunks.loss_pass(inputs, WANTS, 1)).items() if v is not None}
        fake = [(value.shape, value.dtype) for value in op._fake(*inputs, *WANTS, 1, False)]
    assert got["grad_weight"].dtype == got["grad_hidden"].dtype == dtype
    assert [(value.shape, value.dtype) for value in got.values()] == fake
    return {
        name: float((value.double() - getattr(want, name)).norm() / getattr(want, name).double().norm())
        for name, value in got.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: errors(*case) for name, case in CASES.items()}))
