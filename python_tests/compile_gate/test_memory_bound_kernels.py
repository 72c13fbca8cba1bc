"""Kernels that are bound by memory, in machine code: loads that are under way together, conversions, no division.

On a GPU a load takes about a microsecond, and only what is under way at the same time fills the memory's bandwidth. A
compiler that puts the use of a value behind its load, or a branch around each load, halves the speed and changes no
result: no other test would see it.
"""

from __future__ import annotations

import pytest

from python_tests import compile_gate as gate
from python_tests.compile_gate import sass

pytestmark = pytest.mark.skipif(sass.missing_tool() is not None, reason=str(sass.missing_tool()))

EMBED = gate.ROOT / "csrc" / "multistream_embed" / "multistream_embed_cuda.cu"
SCATTER = gate.ROOT / "csrc" / "scatter_sum" / "scatter_sum_cuda.cu"
SAMPLE = gate.ROOT / "csrc" / "multistream_sample" / "multistream_sample_cuda.cu"
IDS = ("int", "long")
#: Types of tables and the elements of their 16-byte vectors.
VECTORS = {"float": 4, "double": 2, "BFloat16": 8, "Float16": 8}


def has_immediate(code: sass.Code, value: str) -> bool:
    return any(value in i.operands for i in code)


@pytest.mark.parametrize("id_type", IDS)
@pytest.mark.parametrize("table", VECTORS)
@pytest.mark.parametrize("has_scale", ["false", "true"])
def test_forward_loads_four_rows_before_it_adds_one(table: str, id_type: str, has_scale: str) -> None:
    code = sass.kernel(
        sass.disassemble(EMBED), f"embed_kernel<{table}, {id_type}, {VECTORS[table]}, {has_scale}>"
    )
    runs = sass.bursts(code, "LDG", "128")
    assert max(runs) >= 7, f"{runs}\n{sass.text(code)}"  # four rows, two vectors of each
    assert runs[-1] == 4, runs  # the copy of a row with one id
    assert sass.matching(code, "STG", "128", "EF"), "the stores are not streaming ones"
    assert sass.calls(code) == []


@pytest.mark.parametrize("id_type", IDS)
@pytest.mark.parametrize("table", VECTORS)
def test_forward_of_odd_widths_loads_as_deep(table: str, id_type: str) -> None:
    code = sass.kernel(sass.disassemble(EMBED), f"embed_kernel<{table}, {id_type}, 1, true>")
    assert max(sass.bursts(code, "LDG")) >= 7 and sass.calls(code) == []


@pytest.mark.parametrize("id_type", IDS)
@pytest.mark.parametrize(("table", "conversion"), [("BFloat16", "BF16"), ("Float16", "F16")])
def test_sixteen_bits_are_converted_by_the_gpu(table: str, conversion: str, id_type: str) -> None:
    code = sass.kernel(sass.disassemble(EMBED), f"embed_kernel<{table}, {id_type}, 8, false>")
    assert len(sass.matching(code, "F2FP", conversion, "F32")) == 8, "two vectors of four pairs"
    # What the CPU adds to round: two integer operations for each number.
    assert not has_immediate(code, "0x7fff") and not has_immediate(code, "0xc8000fff")


@pytest.mark.parametrize("has_scale", ["false", "true"])
@pytest.mark.parametrize("values", VECTORS)
def test_backward_loads_four_rows_before_it_adds_one(values: str, has_scale: str) -> None:
    code = sass.kernel(sass.disassemble(SCATTER), f"chunks_kernel<{values}, {VECTORS[values]}, {has_scale}>")
    runs = sass.bursts(code, "LDG", "128")
    assert max(runs) >= 4 and sum(runs) == 8, f"{runs}\n{sass.text(code)}"
    if values == "BFloat16":
        assert sass.matching(code, "F2FP", "BF16", "F32") and not has_immediate(code, "0x7fff")


def test_backward_divides_by_no_routine() -> None:
    kernels = gate.own(sass.disassemble(SCATTER))  # type: ignore[arg-type, type-var]
    assert len(kernels) > 30
    assert {name: sass.calls(code) for name, code in kernels.items() if sass.calls(code)} == {}
    stores = [sass.matching(kernels[f"gaps_kernel<{t}, {n}>"], "STG", "128") for t, n in VECTORS.items()]
    assert all(stores), "zeros are written 16 bytes at a time"


def test_the_sort_counts_with_32_bits() -> None:
    sorts = [name for name in sass.disassemble(SCATTER) if "RadixSort" in name]
    assert sorts and not any("long" in name for name in sorts), sorts


@pytest.mark.parametrize("logits", ["float", "BFloat16", "Float16"])
def test_top_k_counts_with_atomics_of_32_bits(logits: str) -> None:
    """64 bits in shared memory are a loop of compare-and-swap; only the weights of top-p need them."""
    code = sass.kernel(sass.disassemble(SAMPLE), f"sample_kernel<{logits}>")
    loops = [i for i in sass.matching(code, "ATOMS") if "SPIN" in i.opcode and "64" in i.opcode]
    assert len(loops) <= 4, "the four places at which weights are added to a histogram"
    assert len(sass.matching(code, "ATOMS", "ADD")) >= 6
