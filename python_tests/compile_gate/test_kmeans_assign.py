"""The machine code of the K-Means kernels: loads under way together, few instructions a score, no division."""

from __future__ import annotations

import pytest

from python_tests import compile_gate as gate
from python_tests.compile_gate import sass

CSRC = gate.ROOT / "csrc"
SCORES = 16  # of four clusters and four rows, in one turn of the loop


def kernels(name: str) -> dict[str, sass.Code]:
    if missing := sass.missing_tool():
        pytest.skip(missing)
    return sass.disassemble(CSRC / name)


def loop_around(code: sass.Code, first: sass.Instruction) -> sass.Code:
    """The innermost loop with that instruction."""
    place = {label: number for number, i in enumerate(code) for label in i.labels}
    at = code.index(first)
    for number in range(at, len(code)):
        target = code[number].target
        if code[number].opcode.startswith("BRA") and target in place and place[target] <= at:
            return code[place[target] : number + 1]
    raise AssertionError(f"no loop around {first}:\n{sass.text(code)}")


def test_scores_are_read_by_16_bytes_and_cost_few_instructions():
    for name, code in kernels("kmeans_assign/kmeans_rescore_cuda.cu").items():
        wide = sass.matching(code, "LDG", "128")
        assert len(wide) == 8, name  # four rows of products, four terms
        assert sass.bursts(code, "LDG", "128")[0] >= 4, name
        loop = loop_around(code, wide[0])
        assert not sass.matching(loop, "BAR") and len(loop) <= 17 * SCORES, (name, sass.text(loop))
        assert not sass.calls(code), name


def test_codes_are_made_without_division():
    """Times the power of two of the scale, and by the instruction that rounds to float16; a row has one reciprocal."""
    for name, code in kernels("kmeans_assign/kmeans_quantize_rows_cuda.cu").items():
        assert not [call for call in sass.calls(code) if "div" in call], name
        halves = sass.matching(code, "F2FP", "F16")
        assert halves, name
        assert not sass.calls(min((loop_around(code, half) for half in halves), key=len)), name


def test_sums_wait_for_one_load():
    """Eight rows' values are under way together; their places and labels come from shared memory."""
    for name, code in kernels("kmeans_sums/kmeans_sums_cuda.cu").items():
        assert max(sass.bursts(code, "LDG")) == 8, (name, sass.text(code))
