"""Products by torch's own cuBLAS: layouts against float64 over a simulated library, what is refused, and the search."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from python_tests import cuda_on_cpu
from speechlm_ext.ops.common import cublas
from speechlm_ext.ops.common.native import OpError, native

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NO_REDUCED_PRECISION = 16
#: What `use_cublas_of` looks for.
FUNCTIONS = (
    "cublasGemmEx",
    "cublasGetStream_v2",
    "cublasGetPointerMode_v2",
    "cublasGetMathMode",
    "cublasSetMathMode",
)


@pytest.fixture
def shim(monkeypatch) -> Iterator[ModuleType]:
    """The simulated cuBLAS, which reads and writes by columns as the real one does, not yet checked."""
    shim = cuda_on_cpu.load()
    shim.reset_cublas(True)
    monkeypatch.setattr(cublas, "_is_right", {})
    with cuda_on_cpu.kernels_on_cpu(shim):
        yield shim
    shim.reset_cublas(True)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, dtype=torch.float64)


def laid_out(value: Tensor, dtype: torch.dtype, is_transposed: bool, gap: int) -> Tensor:
    """``value`` in that dtype, whose rows (columns) lie ``gap`` elements of NaN apart."""
    value = value.T if is_transposed else value
    memory = torch.full((value.shape[0], value.shape[1] + gap), float("nan"), dtype=dtype)
    view = memory[:, : value.shape[1]]
    view.copy_(value)
    return view.T if is_transposed else view


def check(m: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """All layouts, with NaN in an output that must not be read, and in gaps that must be left alone."""
    a, b, before = integers(m, k), integers(k, n), integers(m, n)
    for is_a, is_b, gap, accumulate in itertools.product((False, True), (False, True), (0, 3), (False, True)):
        left, right = laid_out(a, dtype, is_a, gap), laid_out(b, dtype, is_b, 2 * gap)
        memory = torch.full((m, n + gap), float("nan"), device=device)
        out = memory[:, :n]
        if accumulate:
            out.copy_(before)
        # Strides survive a move of the whole memory alone.
        cublas.product(out, move(left, device), move(right, device), accumulate=accumulate)
        want = a @ b + (before if accumulate else 0)
        assert torch.equal(out.cpu().double(), want), (is_a, is_b, gap, accumulate)
        assert bool(memory[:, n:].isnan().all())


def move(view: Tensor, device: str) -> Tensor:
    if device == "cpu":
        return view
    moved = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device)
    return moved.copy_(view)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (1, 6, 4), (6, 1, 4), (4, 6, 1), (17, 33, 64)])
def test_matches_float64_in_every_layout(shim, shape, dtype):
    check(*shape, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_on_a_gpu(dtype):
    assert cublas.has_cublas(torch.empty(0, device="cuda")), native.cublas_library()
    for shape in ((5, 3, 7), (1, 6, 4), (6, 1, 4), (4, 6, 1), (130, 257, 96)):
        check(*shape, dtype, "cuda")


@pytest.mark.cuda
def test_sums_in_float32_whatever_torch_allows():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_accumulation = matmul.allow_fp16_reduced_precision_reduction = True
    try:
        a, b = torch.ones(64, 8191, device="cuda").half(), torch.ones(8191, 64, device="cuda").half()
        out = torch.empty(64, 64, device="cuda")
        cublas.product(out, a, b, accumulate=False)
        assert bool((out == 8191).all())
    finally:
        matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.cuda
def test_captures():
    a, b = integers(64, 48).half().cuda(), integers(48, 32).half().cuda()
    out = torch.zeros(64, 32, device="cuda")
    assert cublas.has_cublas(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cublas.product(out, a, b, accumulate=True)
    for _ in range(3):
        graph.replay()
    assert torch.equal(out.double(), 3 * (a.double() @ b.double()))


def test_empty_products(shim):
    out = torch.full((2, 3), 5.0)
    cublas.product(out, torch.empty(2, 0).half(), torch.empty(0, 3).half(), accumulate=True)
    assert bool((out == 5).all())
    cublas.product(out, torch.empty(2, 0).half(), torch.empty(0, 3).half(), accumulate=False)
    assert bool((out == 0).all())
    cublas.product(torch.empty(0, 3), torch.empty(0, 4).half(), torch.empty(4, 3).half(), accumulate=False)
    cublas.product(torch.empty(2, 0), torch.empty(2, 4).half(), torch.empty(4, 0).half(), accumulate=False)


@pytest.mark.parametrize(
    ("a", "b", "out", "says"),
    [
        (torch.zeros(2, 3).half(), torch.zeros(4, 5).half(), torch.zeros(2, 5), "sizes do not fit"),
        (torch.zeros(2, 3).half(), torch.zeros(3, 5).half(), torch.zeros(3, 5), "sizes do not fit"),
        (torch.zeros(2, 3).half(), torch.zeros(3, 5).bfloat16(), torch.zeros(2, 5), "b has the wrong dtype"),
        (torch.zeros(2, 3).double(), torch.zeros(3, 5).double(), torch.zeros(2, 5), "a has the wrong dtype"),
        (torch.zeros(2, 3).half(), torch.zeros(3, 5).half(), torch.zeros(2, 5).half(), "out has the wrong"),
        (torch.zeros(2, 3).half(), torch.zeros(3).half(), torch.zeros(2, 5), "b must be a matrix"),
        (
            torch.zeros(2, 6).half()[:, ::2],
            torch.zeros(3, 5).half(),
            torch.zeros(2, 5),
            "a must be contiguous",
        ),
        (
            torch.zeros(1, 3).half().expand(2, 3),
            torch.zeros(3, 5).half(),
            torch.zeros(2, 5),
            "a must be contig",
        ),
        (torch.zeros(2, 3).half(), torch.zeros(3, 5).half(), torch.zeros(5, 2).T, "the rows of out must be"),
    ],
)
def test_refuses(shim, a, b, out, says):
    with pytest.raises(OpError, match=says):
        cublas.product(out, a, b, accumulate=False)


def test_the_handle_is_left_as_it_was(shim):
    """16-bit factors are summed in float32 whatever the handle allows; float32 ones are multiplied as it says."""
    handle, out = shim.cublas_handle(), torch.empty(2, 2)
    handle.math_mode = 3  # TF32
    cublas.product(out, torch.ones(2, 2).half(), torch.ones(2, 2).half(), accumulate=False)
    assert (handle.math_mode_of_product, handle.math_mode) == (NO_REDUCED_PRECISION, 3)
    cublas.product(out, torch.ones(2, 2), torch.ones(2, 2), accumulate=False)
    assert (handle.math_mode_of_product, handle.math_mode) == (3, 3)
    handle.next_status = 13
    with pytest.raises(RuntimeError, match=r"cublasGemmEx: CUBLAS_STATUS_EXECUTION_FAILED \(13\)"):
        cublas.product(out, torch.ones(2, 2).half(), torch.ones(2, 2).half(), accumulate=False)
    assert handle.math_mode == 3


def test_another_stream_or_scalars_of_the_device_are_refused(shim, monkeypatch):
    out, ones = torch.empty(2, 2), torch.ones(2, 2).half()
    with monkeypatch.context() as patch, pytest.raises(OpError, match="not of the given stream"):
        patch.setattr(cublas, "stream_handle", lambda tensor: 8)
        cublas.product(out, ones, ones, accumulate=False)
    shim.cublas_handle().pointer_mode = 1
    with pytest.raises(OpError, match="scalars from device memory"):
        cublas.product(out, ones, ones, accumulate=False)


@pytest.mark.parametrize("fault", ["ignores_transposes", "sums_in_half", "next_status"])
def test_a_library_that_is_wrong_is_not_used(shim, caplog, fault):
    assert cublas.has_cublas(torch.empty(0))
    cublas._is_right.clear()
    setattr(shim.cublas_handle(), fault, 15 if fault == "next_status" else True)
    with caplog.at_level(logging.WARNING, "speechlm_ext"):
        assert not cublas.has_cublas(torch.empty(0))
        assert not cublas.has_cublas(torch.empty(0))
    (record,) = caplog.records  # once
    assert "torch's operators" in record.getMessage()


def test_nothing_is_checked_while_a_graph_is_captured(shim, monkeypatch):
    """The check waits for the GPU. So that call's products are torch's, and the next call checks."""
    there = SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(cublas, "_fault", lambda library, tensor: pytest.fail("checked"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not cublas.has_cublas(there)
    monkeypatch.setattr(cublas, "_fault", lambda library, tensor: "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cublas.has_cublas(there)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cublas.has_cublas(there)  # known by now


def test_no_library(shim, caplog):
    shim.reset_cublas(False)
    with caplog.at_level(logging.WARNING, "speechlm_ext"):
        assert not cublas.has_cublas(torch.empty(0))
    assert "found no cuBLAS" in caplog.text
    with pytest.raises(OpError, match="torch has loaded no cuBLAS"):
        cublas.product(torch.empty(2, 2), torch.ones(2, 2).half(), torch.ones(2, 2).half(), accumulate=False)


# ---- the search -----------------------------------------------------------------------------------------------------
def library(folder, name: str, functions: tuple[str, ...], *needs: str) -> str:
    """A library that has these functions, and is linked with others of its folder."""
    source = folder / f"{name}.c"
    source.write_text("".join(f"int {function}(void) {{ return 0; }}\n" for function in functions))
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    links = [f"-L{folder}", "-Wl,--no-as-needed", *(f"-l:{need}" for need in needs), f"-Wl,-rpath,{folder}"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source, *links], check=True
    )
    return str(folder / name)


def found_after(loads: list[str], library: str) -> str:
    """What a new process finds that has loaded these."""
    script = (
        "import ctypes, sys; import torch; from speechlm_ext import _C\n"
        "loaded = [ctypes.CDLL(path) for path in sys.argv[2:]]\n"
        "print(_C.use_cublas_of(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, library, *loads]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into Linux's loader")
def test_finds_the_cublas_that_torch_uses(tmp_path):
    """Of two loaded versions, the one that torch's library was linked with; nothing that is not loaded; all or none."""
    (tmp_path / "old").mkdir()
    old = library(tmp_path / "old", "libcublas.so.13", FUNCTIONS)
    mine = library(tmp_path, "libcublas.so.12", FUNCTIONS)
    torch_cuda = library(tmp_path, "libtorch_cuda_of_a_test.so", (), "libcublas.so.12")
    partial = library(tmp_path, "libcublas.so.11", FUNCTIONS[:-1])
    assert found_after([old, torch_cuda], torch_cuda) == mine
    assert found_after([old], torch_cuda) == old
    assert found_after([], torch_cuda) == ""
    assert found_after([partial], torch_cuda) == ""
