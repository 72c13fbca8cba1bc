"""The float16 products of the GPU path sum in float32, whatever torch's settings allow, within the proof's bound.

Those by cuBLAS itself are in python_tests/ops/common/test_cublas.py; here they are torch's, where cuBLAS is not found.
"""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import speechlm_ext as sx
from benchmarks.common.accumulation import ROWS, WIDTHS, worst_ratio
from python_tests import cuda_on_cpu
from python_tests.ops.kmeans_assign.test_kmeans_assign import assert_exact, randn
from speechlm_ext.ops import OpError
from speechlm_ext.ops.common.cublas import has_cublas, product
from speechlm_ext.ops.common.precision import float32_sums, multiply_float16

assign_module = sys.modules["speechlm_ext.ops.kmeans_assign.kmeans_assign"]
MATMUL = torch.backends.cuda.matmul
#: What must be off during the products.
SETTINGS = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")


@pytest.fixture
def settings():
    """All settings on, as a user may have them; restored afterwards."""
    if not hasattr(MATMUL, "allow_fp16_accumulation"):
        pytest.skip("this torch always sums float16 products in float32")
    before = {name: getattr(MATMUL, name) for name in SETTINGS}
    for name in SETTINGS:
        setattr(MATMUL, name, True)
    yield lambda: [getattr(MATMUL, name) for name in SETTINGS]
    for name, value in before.items():
        setattr(MATMUL, name, value)  # which also allows to split the sum again


@pytest.fixture
def by_torch(monkeypatch):
    """No cuBLAS is found, so the products are torch's."""
    monkeypatch.setattr(assign_module, "has_cublas", lambda tensor: False)


@pytest.fixture
def products(settings, by_torch, monkeypatch):
    """The settings during each product of the op."""
    seen, real = [], torch.mm

    def spy(*args, **kwargs):
        seen.append(settings())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    return seen


def test_settings_are_off_during_every_product(settings, products):
    with cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load()):
        assert_exact(randn(50, 9, seed=1), randn(30, 9, seed=2))
    assert products and all(seen == [False, False] for seen in products)
    assert settings() == [True, True]


def test_settings_are_restored_after_an_error(settings, by_torch, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", fail)
    with (
        cuda_on_cpu.kernels_on_cpu(cuda_on_cpu.load()),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        sx.ops.kmeans_assign(randn(5, 9, seed=1), randn(3, 9, seed=2))
    assert settings() == [True, True]


def test_split_of_the_sum_keeps_its_setting(settings):
    name = "allow_fp16_reduced_precision_reduction"
    if not hasattr(MATMUL, f"{name}_split_k"):
        pytest.skip("this torch has no setting for splitting sums")
    for before in ((True, True), (False, True), (False, False)):  # torch refuses (True, False)
        setattr(MATMUL, name, before)
        with float32_sums():
            assert not getattr(MATMUL, name)
        assert (getattr(MATMUL, name), getattr(MATMUL, f"{name}_split_k")) == before


def test_overlapping_callers(settings):
    """The first to leave must not switch the settings on below the other."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        with float32_sums():
            first_is_in.set()
            assert second_is_in.wait(60)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(60)
    with float32_sums():
        second_is_in.set()
        assert first_is_out.wait(60)
        assert settings() == [False, False]
    thread.join()
    assert settings() == [True, True]


def test_setting_changed_meanwhile(settings):
    """A result that may be wrong is an error, and the other thread's setting stays."""
    MATMUL.allow_fp16_accumulation = False
    with (
        pytest.raises(OpError, match="allow_fp16_accumulation was changed by another thread"),
        float32_sums(),
    ):
        MATMUL.allow_fp16_accumulation = True
    assert settings() == [True, True]


def by_torch_in_float32(out, a, b):
    with float32_sums():
        multiply_float16(out, a, b)


def by_cublas(out, a, b):
    assert has_cublas(out)
    product(out, a, b.T, accumulate=False)


@pytest.mark.cuda
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("multiply", [by_torch_in_float32, by_cublas])
def test_error_is_within_the_bound(settings, record_property, multiply, rows, width):
    """``|Q − exact|`` of products whose sums lose as much as they can, with the settings on."""
    worst = worst_ratio(multiply, rows, width, "cuda")
    record_property("error_by_bound", worst)
    assert worst <= 1, worst


def test_the_measure_of_the_bound_sees_a_sum_in_float16():
    """And passes one in float32: so a device that sums in less is found."""

    def in_half(out, a, b):
        sums = torch.zeros(out.shape, dtype=torch.float16)
        for f in range(a.shape[1]):
            sums += a[:, f, None] * b[:, f]
        out.copy_(sums)

    assert worst_ratio(in_half, 4, 64, "cpu", columns=5) > 1
    exact = lambda out, a, b: torch.mm(a.float(), b.float().T, out=out)  # noqa: E731
    assert 0 < worst_ratio(exact, 4, 64, "cpu", columns=5) < 1
