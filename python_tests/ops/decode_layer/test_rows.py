"""add_rms_norm, rope_and_store and silu_mul: their values, transformers' own, and the cache that is written."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from python_tests.ops.common.instruction_sets import simd
from python_tests.ops.decode_layer.cases import DTYPES, SETS, assert_close, make_cache
from speechlm_ext.ops.decode_layer import add_rms_norm, reference, rope_and_store, silu_mul

HALVES = [torch.bfloat16, torch.float16]


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of one dtype, in units of the last place of their values."""
    gap = (a.double() - b.double()).abs() / (b.double().abs() * torch.finfo(a.dtype).eps).clamp(min=1e-30)
    return float(gap.max()) if gap.numel() else 0.0


@pytest.mark.parametrize("rounds_last", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (2, 15), (3, 64), (17, 130), (1, 2049)])
def test_norm_matches_reference(shape, dtype, has_residual, rounds_last, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device=device).to(dtype)
    rest = residual if has_residual else None
    normed, summed = add_rms_norm(x, rest, weight, 1e-5, rounds_last=rounds_last)
    assert torch.equal(summed, x + residual if has_residual else x)
    exact, _ = reference.add_rms_norm(summed.double(), None, weight.double(), 1e-5, False)
    assert_close(normed, exact, roundings=1 if rounds_last else 2, terms=4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm])
def test_norm_is_transformers(norm, dtype, device):
    """To a few units in the last place: only the order of the sum of squares differs."""
    module = norm(100, 1e-6).to(device=device, dtype=dtype)
    module.weight.data = torch.randn(100, device=device).to(dtype)
    x = torch.randn(50, 100, device=device).to(dtype)
    with torch.no_grad():
        got, _ = add_rms_norm(x, None, module.weight, 1e-6, rounds_last=norm is Olmo2RMSNorm)
        want = module(x)
    assert ulps_apart(got, want) <= (4 if dtype == torch.float32 else 1.5)
    if dtype != torch.float32:
        assert (got == want).double().mean() > 0.995


def test_norm_of_zeros_huge_and_tiny_values(device):
    x = torch.tensor([[0.0, 0.0], [1e18, -1e18], [1e-30, 0.0]], device=device)
    normed, _ = add_rms_norm(x, None, torch.ones(2, device=device), 1e-6)
    want = torch.tensor([[0.0, 0.0], [1.0, -1.0], [1e-27, 0.0]], device=device)
    torch.testing.assert_close(normed, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (3, 34), (17, 126), (2, 0)])
def test_silu_matches_reference(shape, dtype, device):
    gate_up = (torch.randn(shape, device=device) * 4).to(dtype)
    assert_close(
        silu_mul(gate_up), reference.silu_mul(gate_up.double()), roundings=2 if dtype in HALVES else 4
    )


def test_silu_of_extremes(device):
    gate = torch.tensor(
        [-float("inf"), -200.0, -95.0, -0.0, 0.0, 80.0, 3e38, float("nan"), float("inf")], device=device
    )
    got = silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    want = torch.nn.functional.silu(gate)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-37, equal_nan=True)


# ---- rope_and_store -------------------------------------------------------------------------------------------------
def tables(num_positions: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(num_positions)[:, None] / 100 ** (torch.arange(size // 2) / (size // 2))
    angle = torch.cat([angle, angle], dim=1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def make_step(num_rows, heads, groups, key_size, value_size, dtype, device, num_slots=40, num_positions=30):
    """qkv, position, slot, keys, values."""
    qkv = torch.randn(num_rows, (heads + groups) * key_size + groups * value_size).to(dtype)
    position, slot = torch.randint(0, num_positions, (num_rows,)), torch.randperm(num_slots)[:num_rows]
    keys, values = make_cache(num_slots, num_positions, groups, key_size, value_size, dtype)
    return [t.to(device) for t in (qkv, position, slot, keys, values)]


NORMS = {
    "none": (False, False, "head"),
    "head": (True, True, "head"),
    "all": (True, True, "all"),
    "keys": (False, True, "all"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2, 5), (5, 6, 2, 64, 64), (17, 4, 4, 38, 3), (0, 2, 1, 8, 8)])
def test_rope_matches_reference(shape, norms, dtype, device):
    num_rows, heads, groups, size, value_size = shape
    qkv, position, slot, keys, values = make_step(*shape, dtype, device)
    cos, sin = (t.to(device) for t in tables(30, size, dtype))
    has_q, has_k, over = NORMS[norms]
    weights = [
        torch.randn(size * (n if over == "all" else 1), device=device).to(dtype) if has else None
        for has, n in ((has_q, heads), (has_k, groups))
    ]
    want_keys, want_values = keys.double(), values.double()
    exact = reference.rope_and_store(
        *(qkv.double(), cos.double(), sin.double(), position, slot, want_keys, want_values, heads),
        *(None if w is None else w.double() for w in weights),
        *(1e-6, over == "all"),
    )
    untouched = torch.ones(40, 30, dtype=torch.bool, device=device)
    untouched[slot, position] = False
    before = keys[untouched].clone(), values[untouched].clone()
    query = rope_and_store(qkv, cos, sin, position, slot, keys, values, heads, *weights, 1e-6, over)
    # A rotation may cancel: what is lost then is a part of the operands.
    assert_close(
        query, exact, roundings=5, terms=16 + 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    )
    assert_close(
        keys, want_keys, roundings=5, terms=16 + 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    )
    assert torch.equal(values.double(), want_values)
    assert torch.equal(keys[untouched], before[0]) and torch.equal(values[untouched], before[1])


@pytest.mark.parametrize("table_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rope_is_transformers_to_the_bit(dtype, table_dtype, device):
    qkv, position, slot, keys, values = make_step(7, 4, 2, 48, 32, dtype, device)
    cos, sin = (t.to(device) for t in tables(30, 48, dtype if table_dtype == "same" else torch.float32))
    query = rope_and_store(qkv, cos, sin, position, slot, keys, values, 4)
    q, k, v = qkv.split([4 * 48, 2 * 48, 2 * 32], dim=1)
    want = apply_rotary_pos_emb(
        q.view(7, 1, 4, 48).transpose(1, 2),
        k.view(7, 1, 2, 48).transpose(1, 2),
        cos[position][:, None],
        sin[position][:, None],
    )
    assert torch.equal(query, want[0][:, :, 0].to(dtype))
    assert torch.equal(keys[slot, position], want[1][:, :, 0].to(dtype))
    assert torch.equal(values[slot, position], v.view(7, 2, 32))


def test_without_rotation_and_in_a_cache_with_strides(device):
    qkv, position, slot, keys, values = make_step(5, 3, 1, 7, 4, torch.float32, device)
    both = torch.zeros(40, 2, 60, 1, 7, device=device)  # another layer's rows between them
    strided_keys, strided_values = both[:, 1, ::2], torch.zeros(30, 40, 1, 4, device=device).transpose(0, 1)
    query = rope_and_store(qkv, None, None, position, slot, strided_keys, strided_values, 3)
    assert torch.equal(query.flatten(1), qkv[:, :21])
    assert torch.equal(strided_keys[slot, position, 0], qkv[:, 21:28])
    assert torch.equal(strided_values[slot, position, 0], qkv[:, 28:])
    assert both.count_nonzero() == qkv[:, 21:28].count_nonzero()
    assert not both[:, 0].any() and not both[:, 1, 1::2].any()


def test_rows_out_of_range_write_nothing(device):
    num_rows = 8
    position = torch.tensor([-1, 30, 2**62, 3, 4, 5, -(2**63), 25], device=device)
    slot = torch.tensor([0, 1, 2, -1, 40, 2**62, 6, 7], device=device)
    qkv, _, _, keys, values = make_step(num_rows, 2, 1, 8, 8, torch.float32, device)
    cos, sin = (t.to(device) for t in tables(25, 8, torch.float32))  # shorter than the cache
    before = keys.clone(), values.clone()
    query = rope_and_store(qkv, cos, sin, position, slot, keys, values, 2)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1]) and not query.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_rows_nor_threads_nor_the_instruction_set(dtype):
    qkv, position, slot, keys, values = make_step(33, 6, 2, 40, 24, dtype, "cpu")
    cos, sin = tables(30, 40, dtype)
    q_norm, k_norm = torch.randn(240).to(dtype), torch.randn(80).to(dtype)
    weight = torch.randn(qkv.shape[1]).to(dtype)

    def outputs(rows, num_values=None):
        k, v = keys.clone(), values.clone()
        parts = qkv[rows], cos, sin, position[rows], slot[rows], k, v, 6
        over_heads = rope_and_store(*parts, q_norm[:40], k_norm[:40], 1e-6)
        head_keys = k[slot[rows], position[rows]]
        over_all = rope_and_store(*parts, q_norm, k_norm, 1e-6, "all")
        found = (over_heads, head_keys, over_all, k[slot[rows], position[rows]], silu_mul(qkv[rows]))
        return [*found, *add_rms_norm(qkv[rows], qkv[rows], weight, 1e-6)]

    alone = [torch.cat(parts) for parts in zip(*(outputs(slice(m, m + 1)) for m in range(33)), strict=True)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name in SETS:
                with simd(name):
                    for first, last in ((0, 33), (5, 7), (10, 27), (17, 33)):
                        for got, want in zip(outputs(slice(first, last)), alone, strict=True):
                            assert torch.equal(got, want[first:last]), name
    finally:
        torch.set_num_threads(before)


def test_non_contiguous_inputs(device):
    wide = torch.randn(4, 20, device=device)
    x, weight = wide[:, ::2], torch.randn(20, device=device)[::2]
    got, want = (
        add_rms_norm(x, wide[:, 1::2], weight, 1e-6),
        add_rms_norm(x.contiguous(), wide[:, 1::2].contiguous(), weight.contiguous(), 1e-6),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(silu_mul(x), silu_mul(x.contiguous()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sin=None), "cos and sin must be given both"),
        (dict(cos=torch.zeros(9, 4).double()), "cos must be float32; got float64"),
        (dict(position=torch.zeros(2, dtype=torch.int32)), "position must be int64"),
        (dict(slot=torch.zeros(3, dtype=torch.int64)), "slot must have size 2"),
        (dict(qkv=torch.zeros(2, 15)), "qkv must have size 16 in dimension 1"),
        (dict(keys=torch.zeros(3, 9, 1, 8)[..., ::2]), "keys must be contiguous in dimensions 2 and later"),
        (dict(keys=torch.zeros(3, 9, 4)), r"keys \[B, R, G, E\]"),
        (dict(values=torch.zeros(3, 8, 1, 4)), "values must have size 9 in dimension 1"),
        (dict(q_norm=torch.zeros(8)), "q_norm must have size 4"),
        (dict(k_norm=torch.zeros(5), norm_over="all"), "k_norm must have size 4"),
        (dict(norm_over="heads"), "norm_over must be 'head' or 'all'"),
        (dict(num_heads=-1), "num_heads must be 0 or more"),
        (dict(qkv=torch.zeros(2, 16, requires_grad=True)), "has no gradients"),
    ],
)
def test_rope_rejects_bad_input(change, message):
    arguments = dict(
        qkv=torch.zeros(2, 16),
        cos=torch.zeros(9, 4),
        sin=torch.zeros(9, 4),
        position=torch.zeros(2, dtype=torch.int64),
        slot=torch.arange(2),
        keys=torch.zeros(3, 9, 1, 4),
        values=torch.zeros(3, 9, 1, 4),
        num_heads=2,
    )
    with pytest.raises(ValueError, match=message):
        rope_and_store(**{**arguments, **change})


def test_norm_and_silu_reject_bad_input():
    with pytest.raises(ValueError, match=r"weight must have size 4"):
        add_rms_norm(torch.zeros(2, 4), None, torch.zeros(3), 1e-6)
    with pytest.raises(ValueError, match="residual must have size 2 in dimension 0"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match="even number of columns"):
        silu_mul(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"gate_up must be float \[M, 2 I\]"):
        silu_mul(torch.zeros(4))
    rope = torch.zeros(2, 15), torch.zeros(9, 3), torch.zeros(9, 3), torch.arange(2), torch.arange(2)
    with pytest.raises(ValueError, match="even head size"):
        rope_and_store(*rope, torch.zeros(3, 9, 1, 3), torch.zeros(3, 9, 1, 6), 2)
