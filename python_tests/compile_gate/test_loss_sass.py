"""Machine code of multistream_loss: what its speed on a GPU rests on."""

from __future__ import annotations

from functools import cache

import pytest

from python_tests import compile_gate as gate
from python_tests.compile_gate import sass

pytestmark = pytest.mark.skipif(sass.missing_tool() is not None, reason=str(sass.missing_tool()))


@cache
def code_of(part: str, name: str) -> sass.Code:
    source = gate.ROOT / "csrc" / "multistream_loss" / f"multistream_loss_{part}_cuda.cu"
    return sass.kernel(sass.disassemble(source), name)


def straight_runs(code: sass.Code) -> list[sass.Code]:
    """The instructions between one label or branch and the next."""
    runs: list[sass.Code] = [[]]
    for i in code:
        if i.labels:
            runs.append([])
        runs[-1].append(i)
        if i.opcode.startswith(("BRA", "BRX", "EXIT", "RET")):
            runs.append([])
    return runs


@pytest.mark.parametrize("dtype", ["BFloat16", "Float16", "float"])
def test_logits_biases_and_factors_are_loaded_16_bytes_at_a_time(dtype: str) -> None:
    """Every reading of the row: for one stream, for a tile, for the maximum and for the shared exponentials."""
    code = code_of("statistics", f"statistics_kernel<{dtype}, false, false>")
    assert len(sass.matching(code, "LDG", "128")) >= 20
    assert max(sass.bursts(code, "LDG", "128")) >= 2


@pytest.mark.parametrize("dtype", ["BFloat16", "Float16", "float"])
def test_streams_that_share_exponentials_compute_none(dtype: str) -> None:
    """The gradient's loop over the streams of such a tile: 16 rows' terms, and no exponential."""
    runs = straight_runs(code_of("gradient", f"gradient_kernel<{dtype}, false>"))
    over_rows = [run for run in runs if len(sass.matching(run, "LDS")) >= 16]
    assert over_rows and not any(sass.matching(run, "MUFU", "EX2") for run in over_rows)
    assert max(map(len, over_rows)) <= 16 * 12  # instructions for a row


@pytest.mark.parametrize(
    "name", ["statistics_kernel<BFloat16, false, false>", "gradient_kernel<BFloat16, false>"]
)
def test_no_division_of_64_bits(name: str) -> None:
    assert not [
        call for call in sass.calls(code_of(name.split("_")[0], name)) if "s64" in call or "u64" in call
    ]
