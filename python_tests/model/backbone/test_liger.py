"""Liger's kernels in a body, by Triton's interpreter on the CPU; runs where liger_kernel and triton are installed.

In a process of its own: the interpreter is chosen when Triton is first imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

MISSING = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]


class _Number(float):
    """Kernels convert their scalars, which are tensors on a GPU; the interpreter hands over plain numbers."""

    def to(self, dtype: object) -> _Number:
        return self


def interpreted() -> dict[str, list[str]]:
    """Model type -> parts of its body that Liger computes with the body's own results."""
    import torch
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    from python_tests.model.backbone.test_acceleration import make_body
    from speechlm_ext.model.backbone import acceleration

    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda value: _Number(value) if type(value) is float else convert(value)
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # the interpreter has no libdevice, and exchanges what is in tl
    torch.set_num_threads(1)
    kernels = acceleration.liger_kernels()
    return {kind: acceleration.apply_kernels(make_body(kind), kernels) for kind in ("llama", "qwen3")}


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_liger_gives_what_the_layers_give() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "python_tests.model.backbone.test_liger"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    parts = json.loads(ran.stdout.splitlines()[-1])
    assert parts == {"llama": ["norm", "rotary", "gate"], "qwen3": ["norm", "rotary", "gate"]}


if __name__ == "__main__":
    print(json.dumps(interpreted()))
