"""The gate on output of ptxas, and on kernels with a planted spill and a planted error."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from python_tests import compile_gate as gate

PRINTED = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fineIiEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z4fineIiEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 384 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 1.2 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_80'
ptxas info    : Function properties for _Z5spillPf
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, 360 bytes cmem[0]
"""
FINE = gate.Usage(registers=30, stack=0, spill_stores=0, spill_loads=0, shared=384)

# Three hundred values that live at once do not fit into a thread's 255 registers.
SPILLS = """
extern "C" __global__ void spills(float* out, const float* in) {
  float v[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) v[i] = in[i * 7 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int j = 1; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 300; ++i) v[i] = v[i] * v[(i * 131 + j) % 300] + out[i];
#pragma unroll
  for (int i = 0; i < 300; ++i) out[i * 9 + threadIdx.x] = v[i];
}
"""


def table_of(**kernels: gate.Usage) -> dict:
    return gate.as_table({k: {"sm_80": u} for k, u in kernels.items()}, "13.0", {})


def test_reads_what_ptxas_prints():
    spill = gate.Usage(registers=255, stack=40, spill_stores=36, spill_loads=44, shared=0)
    assert gate.parse_ptxas(PRINTED) == {"sm_80": {"_Z4fineIiEvPT_": FINE, "_Z5spillPf": spill}}
    both = gate.parse_ptxas(PRINTED + PRINTED.replace("sm_80", "sm_100"))
    assert both["sm_100"] == both["sm_80"]
    with pytest.raises(gate.GateError, match="no usage of _Z5spillPf"):
        gate.parse_ptxas(PRINTED.rsplit("\n", 2)[0])


def test_what_a_build_said_counts_while_it_is_current(tmp_path: Path):
    source = gate.sources()[0]
    log = tmp_path / "CMakeFiles/speechlm_core.dir" / source.relative_to(gate.ROOT)
    log = log.with_name(log.name + ".o.ptxas")
    log.parent.mkdir(parents=True)
    assert gate.kept(source, tmp_path) is None
    text = "".join(PRINTED.replace("sm_80", arch) for arch in gate.ARCHITECTURES)
    log.write_text(text, "utf-8")
    assert gate.kept(source, tmp_path) == text
    log.write_text(PRINTED, "utf-8")  # a build for fewer architectures
    assert gate.kept(source, tmp_path) is None
    log.write_text(text, "utf-8")
    os.utime(log, (1, 1))
    assert gate.kept(source, tmp_path) is None


def test_the_launcher_keeps_what_ptxas_says_and_passes_on_the_rest(tmp_path: Path):
    launcher, out = gate.ROOT / "cmake" / "keep_ptxas.sh", tmp_path / "x.o"
    says = f"printf '%s' \"{PRINTED}\" >&2; echo 'x.cu: warning: odd' >&2; exit $0"
    for code in (0, 3):
        done = subprocess.run(
            [launcher, "sh", "-c", says, str(code), "-o", out], capture_output=True, text=True
        )
        assert done.returncode == code and done.stderr.split() == ["x.cu:", "warning:", "odd"]
        assert (
            gate.parse_ptxas(out.with_name("x.o.ptxas").read_text("utf-8"))["sm_80"]["_Z4fineIiEvPT_"] == FINE
        )


def test_names_are_readable():
    names = gate.readable(["_ZN8speechlm12_GLOBAL__N_117delay_pack_kernelIiEEvNS_13DelayPackArgsIT_EEi"])
    assert list(names.values()) == ["delay_pack_kernel<int>"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"registers": 32}, None),
        ({"registers": 33}, "k on sm_80 takes 33 registers; its budget is 32 (30 in the table)"),
        ({"spill_stores": 4}, "k on sm_80 spills: 4 bytes of spill_stores"),
        ({"shared": 400}, "k on sm_80 takes 400 bytes of shared; its budget is 384"),
        ({"stack": 8}, "k on sm_80 takes 8 bytes of stack; its budget is 0"),
    ],
)
def test_judges_growth_and_spills(change, says):
    wrong = gate.compare({"k": {"sm_80": replace(FINE, **change)}}, table_of(k=FINE), "13.0")
    assert wrong == ([] if says is None else [says])


def test_another_compiler_is_judged_by_spills_alone():
    grown = {"k": {"sm_80": replace(FINE, registers=90)}}
    assert gate.compare(grown, table_of(k=FINE), "12.8") == []
    spilled = {"k": {"sm_80": replace(FINE, spill_loads=4)}}
    assert len(gate.compare(spilled, table_of(k=FINE), "12.8")) == 1


def test_new_and_vanished_kernels_are_named():
    wrong = gate.compare({"new": {"sm_80": FINE}}, table_of(old=FINE), "13.0")
    assert "new on sm_80 is not in the table" in wrong[0] and "old is in the table" in wrong[1]


def test_a_spill_needs_a_reason():
    spilling = replace(FINE, spill_stores=8)
    table = table_of(k=spilling)
    assert gate.compare({"k": {"sm_80": spilling}}, table, "13.0")
    table["kernels"]["k"]["why"] = "measured: faster than fewer threads"
    assert not gate.compare({"k": {"sm_80": spilling}}, table, "13.0")
    assert gate.compare({"k": {"sm_80": replace(spilling, spill_stores=12)}}, table, "13.0")


def test_cub_header_compiles():
    nvcc = gate.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here (CUDA toolkit 12.4 or later)")
    report = gate.compile_all(nvcc, [Path(gate.__file__).with_name("cub_compiles.cu")], targets=("sm_90a",))
    assert any("RadixSort" in kernel for kernel in report) and any("Scan" in kernel for kernel in report)
    # CUB's kernels are not judged; the kernels of the file itself are.
    assert not any("RadixSort" in kernel or "Scan" in kernel for kernel in gate.own(report))


def test_finds_a_real_spill_and_a_real_error(tmp_path: Path):
    nvcc = gate.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here (CUDA toolkit 12.4 or later)")
    source = gate.ROOT / "build" / "compile-gate" / "spills.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(SPILLS, "utf-8")
    report = gate.compile_all(nvcc, [source])
    release = gate.nvcc_release(nvcc)
    wrong = gate.compare(report, gate.as_table(report, release, {}), release)
    assert {line.split(":")[0] for line in wrong} == {f"spills on {a} spills" for a in gate.ARCHITECTURES}
    source.write_text("__global__ void broken( {", "utf-8")
    with pytest.raises(gate.GateError, match="spills.cu does not compile for sm_80"):
        gate.compile_all(nvcc, [source])
