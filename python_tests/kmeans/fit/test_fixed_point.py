"""Exact sums and hashed random numbers: against big integers and rationals, in any order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from speechlm_ext.kmeans.counter_rng import row_keys, uniforms
from speechlm_ext.kmeans.fit.fixed_point import Grid, exact_sum, grid_step, to_grid


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e-300])
@pytest.mark.parametrize("count", [1, 2, 1000, 100_000])
def test_rounded_values_add_without_error(scale, count):
    generator = torch.Generator().manual_seed(count)
    values = scale * torch.randn(count, dtype=torch.float64, generator=generator)
    step = grid_step(values.abs().max(), count)
    rounded = to_grid(values, step)
    assert math.frexp(float(step))[0] == 0.5  # a power of two
    assert float((rounded - values).abs().max()) <= float(step) / 2
    exact = sum((Fraction(v) for v in rounded.tolist()), Fraction(0))
    for order in (torch.arange(count), torch.randperm(count, generator=generator), values.argsort()):
        assert Fraction(float(rounded[order].cumsum(0)[-1])) == exact
        assert Fraction(float(rounded[order].sum())) == exact


def test_rounding_to_the_grid_is_to_the_nearest_multiple():
    step = torch.tensor(0.25, dtype=torch.float64)
    values = torch.tensor([0.0, 0.1, 0.13, 0.125, 0.375, -0.13, -0.6], dtype=torch.float64)
    assert to_grid(values, step).tolist() == [0.0, 0.0, 0.25, 0.0, 0.5, -0.25, -0.5]


@pytest.mark.parametrize(
    ("bound", "count", "exponent"), [(1.0, 1, -50), (0.75, 1, -51), (1.0, 1000, -41), (0.0, 7, -49)]
)
def test_step_by_hand(bound, count, exponent):
    # bound < 2^a, count < 2^b, step = 2^(a + b - 52): 1.0 < 2^1 and 1 < 2^1; 0.75 < 2^0; 1000 < 2^10.
    assert float(grid_step(torch.tensor(bound, dtype=torch.float64), count)) == 2.0**exponent


def test_exact_sum_is_the_sum():
    values = torch.randn(10_001, dtype=torch.float64)
    assert float(exact_sum(values)) == pytest.approx(math.fsum(values.tolist()), rel=1e-9, abs=1e-9)
    assert float(exact_sum(values)) == float(exact_sum(values.flip(0)))
    assert float(exact_sum(values[:0])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_cluster_sums_against_float64(dtype):
    x = (torch.randn(3000, 7) * torch.tensor([1e-3, 1, 1, 1e3, 1, 1, 1]) + 100).to(dtype)
    labels = torch.randint(-1, 5, (3000,))
    grid = Grid.build(x.double().amin(0), x.double().amax(0), 3000)
    results = []
    for parts in ((3000,), (1, 2, 997, 2000), (1500, 1500)):
        sums, counts = torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
        for block, label in reversed(list(zip(x.split(parts), labels.split(parts), strict=True))):
            grid.add_sums(block, label.int(), sums, counts)
        results.append((sums, counts))
    for sums, counts in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(counts, results[0][1])
    sums, counts = results[0]
    assert counts.tolist() == [(labels == k).sum() for k in range(5)]
    want = torch.stack([x[labels == k].double().mean(0) for k in range(5)])
    width = x.double().amax(0) - x.double().amin(0)
    error = (grid.offset + sums / counts[:, None] - want).abs() / width.clamp(min=1e-9)
    assert float(error.max()) < 2.0 ** (12 - 52)  # 3000 < 2^12 rows


def test_rows_that_are_left_out_may_be_nan():
    x = torch.tensor([[1.0], [float("nan")], [3.0]])
    sums, counts = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    grid = Grid.build(torch.tensor([1.0]).double(), torch.tensor([3.0]).double(), 3)
    grid.add_sums(x, torch.tensor([0, -1, 0], dtype=torch.int32), sums, counts)
    assert float(grid.offset + sums / 2) == 2.0 and counts.tolist() == [2]


def test_keys_are_splitmix64():
    """Against the generator's published form in Python's integers."""
    import hashlib

    mask = (1 << 64) - 1
    state = int.from_bytes(hashlib.sha256(b"7/rows").digest()[:8], "little")
    expected = []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    rows = torch.arange(1, 6)
    assert [k & mask for k in row_keys(7, "rows", rows).tolist()] == expected
    assert uniforms(7, "rows", rows).tolist() == [(k >> 11) * 2.0**-53 for k in expected]


def test_keys_depend_on_seed_purpose_and_row_alone():
    rows = torch.arange(1000)
    keys = row_keys(0, "a", rows)
    assert torch.equal(keys[500:], row_keys(0, "a", rows[500:]))
    assert keys.unique().numel() == 1000
    for other in (row_keys(1, "a", rows), row_keys(0, "b", rows)):
        assert not (keys == other).any()
    chance = uniforms(0, "a", torch.arange(100_000))
    assert 0 <= float(chance.min()) and float(chance.max()) < 1
    assert abs(float(chance.mean()) - 0.5) < 0.005 and abs(float(chance.var()) - 1 / 12) < 0.002
