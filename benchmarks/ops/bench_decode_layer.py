"""The parts of a decode layer against their rivals: ``make bench OP=decode_layer``.

* ``linear``: `F.linear`. On the CPU there are as many weights as fill 160 MB, as in a model: none stays in a cache.
* ``attention``: scaled dot-product attention with a mask over the whole cache, the query heads that share keys as rows
  of one product. Lengths are between half of the cache and all of it; the limit is a copy of as many bytes as are
  read.
* ``rows``: both norms, rotation and cache write, and gate of a layer, beside the operations of transformers' layer, and
  on a GPU these compiled by torch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common.harness import Case, compare, compiled, devices
from speechlm_ext.ops.decode_layer import (
    add_rms_norm,
    decode_attention,
    decode_linear,
    reference,
    rope_and_store,
    silu_mul,
)

#: name: (heads, key/value heads, head size, hidden width, intermediate width)
MODELS = {
    "smoke": (4, 2, 16, 64, 96),
    "135m": (9, 3, 64, 576, 1536),
    "360m": (15, 5, 64, 960, 2560),
    "1p7b": (32, 32, 64, 2048, 8192),
    "qwen3_1p7b": (16, 8, 128, 2048, 6144),
}
#: name: (model, rows of a step, rows of a slot of the cache)
SHAPES = {"smoke": ("smoke", 3, 300)} | {
    f"{model}_{num_rows}_{num_keys}": (model, num_rows, num_keys)
    for model in list(MODELS)[1:]
    for num_rows, num_keys in ((1, 500), (4, 500), (16, 500), (1, 2000), (4, 2000), (16, 2000), (256, 500))
}
_WEIGHT_BYTES = 160 << 20


def _dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def _check(expected, tolerance):
    def check(name, got):
        error = float((got.double() - expected).abs().max())
        assert error <= tolerance * float(expected.abs().max()), f"{name} computes something else"

    return check


@torch.no_grad()
def make_linear_case(shape, device):
    """The fused gate and up product of a layer: ``[M, K]`` and ``[2 I, K]``."""
    model, num_rows, _ = SHAPES[shape]
    width, num_outputs = MODELS[model][3], 2 * MODELS[model][4]
    torch.manual_seed(0)
    dtype = _dtype(device)
    size = width * num_outputs * dtype.itemsize
    count = 1 if model == "smoke" else max(1, _WEIGHT_BYTES // size)
    weights = [torch.randn(num_outputs, width, device=device).to(dtype) for _ in range(count)]
    x = torch.randn(num_rows, width, device=device).to(dtype)

    def timed(linear):
        def run():
            with torch.no_grad():
                for weight in weights:
                    out = linear(x, weight)
            return out

        return run

    expected = F.linear(x.double(), weights[-1].double())
    source = torch.empty(count * size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Case(
        op="decode_linear",
        shape=shape,
        device=device,
        ours=timed(decode_linear),
        rivals={"F.linear": timed(F.linear)},
        check=_check(expected, 4 * torch.finfo(dtype).eps),
        limit=lambda: target.copy_(source),
        needs_grad=False,
        extra=dict(num_weights=count, bytes_moved=count * size),
    )


@torch.no_grad()
def make_attention_case(shape, device):
    """A step over the cache of a layer."""
    model, M, R = SHAPES[shape]
    H, G, E, _, _ = MODELS[model]
    torch.manual_seed(0)
    dtype = _dtype(device)
    keys, values = (torch.randn(M, R, G, E, device=device).to(dtype) for _ in range(2))
    query = torch.randn(M, H, E, device=device).to(dtype)
    lengths = torch.linspace(R // 2 + 1, R, M).long() if M > 1 else torch.tensor([R])
    total = int(lengths.sum())
    lengths, slot = lengths.to(device), torch.arange(M, device=device)
    mask = torch.zeros(M, 1, 1, R, dtype=dtype, device=device)
    mask.masked_fill_(torch.arange(R, device=device) >= lengths[:, None, None, None], float("-inf"))

    def ours():
        with torch.no_grad():
            return decode_attention(query, keys, values, lengths, slot, E**-0.5)

    def masked():
        with torch.no_grad():
            out = F.scaled_dot_product_attention(
                query.reshape(M, G, H // G, E), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask
            )
            return out.reshape(M, H * E)

    expected = reference.decode_attention(
        query.double(), keys.double(), values.double(), lengths, slot, E**-0.5, None, None, None
    )
    moved = 2 * total * G * E * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Case(
        op="decode_attention",
        shape=shape,
        device=device,
        ours=ours,
        rivals={"sdpa_with_mask": masked},
        check=_check(expected, 32 * torch.finfo(dtype).eps),
        limit=lambda: target.copy_(source),
        needs_grad=False,
        extra=dict(bytes_moved=moved),
    )


@torch.no_grad()
def make_rows_case(shape, device):
    """All of a layer's step that is neither a product nor attention."""
    model, M, R = SHAPES[shape]
    H, G, E, D, width = MODELS[model]
    eps = 1e-6
    torch.manual_seed(0)
    dtype = _dtype(device)

    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, residual, weight, qkv, gate_up = (
        rand(M, D),
        rand(M, D),
        rand(D),
        rand(M, (H + 2 * G) * E),
        rand(M, 2 * width),
    )
    cos, sin = rand(R, E), rand(R, E)
    position, slot = torch.arange(M, device=device) + 100, torch.arange(M, device=device)
    caches = [(torch.zeros(M, R, G, E, dtype=dtype, device=device),) * 2 for _ in range(2)]

    def ours():
        with torch.no_grad():
            first, summed = add_rms_norm(x, residual, weight, eps)
            query = rope_and_store(qkv, cos, sin, position, slot, *caches[0], H)
            second, _ = add_rms_norm(x, summed, weight, eps)
            return torch.cat([first, query.flatten(1), second, silu_mul(gate_up)], dim=1)

    def eager(keys, values):
        first, summed = reference.add_rms_norm(x, residual, weight, eps, False)
        q, k, v = (part.view(M, -1, E) for part in qkv.split([H * E, G * E, G * E], dim=1))
        c, s = cos[position][:, None], sin[position][:, None]
        query, key = (t * c + torch.cat((-t[..., E // 2 :], t[..., : E // 2]), dim=-1) * s for t in (q, k))
        keys[slot, position], values[slot, position] = key, v
        second, _ = reference.add_rms_norm(x, summed, weight, eps, False)
        return torch.cat([first, query.flatten(1), second, reference.silu_mul(gate_up)], dim=1)

    def timed(run):
        def call():
            with torch.no_grad():
                return run(*caches[1])

        return call

    rivals = {"eager": timed(eager)}
    with torch.no_grad():
        if device == "cuda" and (run := compiled(model, eager, *caches[1])) is not None:
            rivals["compiled"] = timed(run)
    moved = M * ((4 + 3) * D + 2 * (H + 2 * G) * E + 3 * width) * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Case(
        op="decode_rows",
        shape=shape,
        device=device,
        ours=ours,
        rivals=rivals,
        check=_check(eager(*caches[1]).double(), 4 * torch.finfo(dtype).eps),
        limit=lambda: target.copy_(source),
        needs_grad=False,
        extra=dict(bytes_moved=moved),
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("make", [make_linear_case, make_attention_case, make_rows_case])
@pytest.mark.parametrize("shape", SHAPES)
def test_bench(benchmark, shape, make, device):
    model, num_rows, num_keys = SHAPES[shape]
    if device == "cpu" and num_rows > 16:
        pytest.skip("a shape for GPUs")
    if make is not make_attention_case and (num_rows, num_keys) in ((1, 500), (4, 500), (16, 500)):
        pytest.skip("the number of keys is attention's alone")
    compare(benchmark, make(shape, device))
