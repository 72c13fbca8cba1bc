"""What the ops say where torch is too old for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from speechlm_ext.ops.common import matmul
from speechlm_ext.ops.common.native import OpError


def test_a_torch_that_is_too_old_is_named_at_the_import():
    code = "import torch; torch.__version__ = '2.5.1'; import speechlm_ext.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "speechlm_ext needs torch 2.6 or later, and torch 2.5.1 is installed in" in done.stderr
    assert "pip install 'torch>=2.6'" in done.stderr


def test_a_torch_without_float32_results_of_16_bit_products(monkeypatch):
    monkeypatch.setattr(matmul, "GIVES_FLOAT32", False)
    a, out = torch.ones(2, 2, dtype=torch.bfloat16), torch.empty(2, 2)
    with pytest.raises(OpError, match=r"products of torch.bfloat16 .* need torch 2.8 or later; torch 2\."):
        matmul._multiply(out, a, a, accumulate=False)
