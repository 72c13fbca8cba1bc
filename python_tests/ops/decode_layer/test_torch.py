"""The ops of a decode layer inside torch: opcheck, compiled code, and no gradients."""

from __future__ import annotations

import torch
from torch.library import opcheck

from python_tests.ops.decode_layer.test_rows import make_step, tables
from speechlm_ext.ops.decode_layer import (
    add_rms_norm,
    decode_attention,
    decode_linear,
    rope_and_store,
    silu_mul,
)

OPS = torch.ops.speechlm_ext


def test_opcheck(device):
    qkv, position, slot, keys, values = make_step(5, 4, 2, 8, 6, torch.float32, device)
    cos, sin = (t.to(device) for t in tables(30, 8, torch.float32))
    weight, bias = torch.randn(7, qkv.shape[1], device=device), torch.randn(7, device=device)
    opcheck(OPS.decode_linear, (qkv, weight, None))
    opcheck(OPS.decode_linear, (qkv, weight, bias))
    opcheck(OPS.add_rms_norm, (qkv, None, weight[0], 1e-6, False))
    opcheck(OPS.add_rms_norm, (qkv, qkv + 1, weight[0], 1e-6, True))
    norms = torch.randn(8, device=device), torch.randn(8, device=device)
    opcheck(OPS.rope_and_store, (qkv, cos, sin, position, slot, keys, values, 4, *norms, 1e-6, False))
    opcheck(OPS.rope_and_store, (qkv, None, None, position, slot, keys, values, 4, None, None, 0.0, True))
    query = torch.randn(5, 4, 8, device=device)
    opcheck(OPS.decode_attention, (query, keys, values, position + 1, slot, 0.3, None, None, None))
    sinks = torch.randn(4, device=device)
    opcheck(OPS.decode_attention, (query, keys, values, position + 1, slot, 0.3, 9, 2.0, sinks))
    opcheck(OPS.silu_mul, (torch.cat([qkv, qkv], dim=1),))


def test_a_layer_in_compiled_code():
    """One graph, also for another number of rows; the cache is written in place."""
    qkv, position, slot, keys, values = make_step(6, 4, 2, 8, 8, torch.float32, "cpu")
    cos, sin = tables(30, 8, torch.float32)
    residual, out = torch.randn(6, 16), torch.randn(16, 32)
    norm, gate, down = torch.randn(16), torch.randn(40, 16), torch.randn(16, 20)

    def layer(qkv, residual, position, slot, keys, values):
        query = rope_and_store(qkv, cos, sin, position, slot, keys, values, 4)
        mixed = decode_attention(query, keys, values, position + 1, slot, 0.3, window=9)
        x, residual = add_rms_norm(decode_linear(mixed, out), residual, norm, 1e-6)
        return decode_linear(silu_mul(decode_linear(x, gate)), down) + residual

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for num_rows in (6, 3):
            caches = [(keys.clone(), values.clone()) for _ in range(2)]
            parts = [t[:num_rows] for t in (qkv, residual, position, slot)]
            want, got = layer(*parts, *caches[0]), compiled(*parts, *caches[1])
            assert torch.equal(got, want)
            assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
            assert not torch.equal(caches[1][0], keys)


def test_inference_mode_and_parameters():
    """Parameters are no obstacle where autograd does not record."""
    weight = torch.nn.Parameter(torch.randn(4, 8))
    x = torch.randn(2, 8)
    with torch.inference_mode():
        got = decode_linear(x, weight)
    with torch.no_grad():
        assert torch.equal(got, decode_linear(x, weight))
    assert not got.requires_grad


def test_tensors_on_meta():
    x = torch.randn(5, 16, device="meta")
    assert decode_linear(x, torch.randn(3, 16, device="meta")).shape == (5, 3)
    assert [t.shape for t in add_rms_norm(x, x, x[0], 1e-6)] == [(5, 16)] * 2
    assert silu_mul(x).shape == (5, 8)
