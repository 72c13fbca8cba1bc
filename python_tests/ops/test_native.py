"""What the ops say where torch is too old for them."""

from __future__ import annotations

import pytest
import torch

from speechlm_ext.ops.common import matmul
from speechlm_ext.ops.common.native import OpError


def test_a_torch_without_float32_results_of_16_bit_products(monkeypatch):
    monkeypatch.setattr(matmul, "GIVES_FLOAT32", False)
    a, out = torch.ones(2, 2, dtype=torch.bfloat16), torch.empty(2, 2)
    with pytest.raises(OpError, match=r"products of torch.bfloat16 .* need torch 2.8 or later; torch 2\."):
        matmul._multiply(out, a, a, accumulate=False)
