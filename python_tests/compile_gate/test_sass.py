"""The reader of machine code, on a listing with known runs of loads."""

from __future__ import annotations

import pytest

from python_tests.compile_gate import sass

LISTING = """
	.section	.text._ZN8speechlm12_GLOBAL__N_14loadIiEEvPT_,"ax",@progbits
.text._ZN8speechlm12_GLOBAL__N_14loadIiEEvPT_:
        .type           _ZN8speechlm12_GLOBAL__N_14loadIiEEvPT_,@function
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   FADD R5, R9.reuse, R7 ;
.L_x_1:
        /*0040*/                   LDG.E.128.CONSTANT R12, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E R16, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.128 R20, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.128 R24, desc[UR4][R2.64] ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R24 ;
        /*0090*/              @!P0 BRA P1, `(.L_x_1) ;
        /*00a0*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
        /*00b0*/                   MOV R15, 0x1 ;
        /*00c0*/                   SHFL.IDX PT, R28, R15, R3, 0x1f ;
        /*00d0*/                   CALL.REL.NOINC `($__internal_4_$__cuda_sm20_div_s64) ;
        /*00e0*/                   EXIT ;
        .weak           $__internal_4_$__cuda_sm20_div_s64
$__internal_4_$__cuda_sm20_div_s64:
        /*00f0*/                   RET.REL.NODEC R4 `(_ZN8speechlm12_GLOBAL__N_14loadIiEEvPT_) ;
"""


@pytest.fixture
def code() -> sass.Code:
    return sass.kernel(sass.parse(LISTING), "load<int>")


def test_reads_instructions(code: sass.Code) -> None:
    assert [i.address for i in code] == list(range(0, 0x100, 16))
    load = code[2]
    assert (load.opcode, load.guard, load.written, load.read) == (
        "LDG.E.128",
        "@P0",
        {8, 9, 10, 11},
        {2},
    )
    assert code[3].read == {7, 9} and code[3].written == {5}
    store, shuffle = code[8], code[12]
    assert store.read == {2, 24} and store.written == set()
    assert shuffle.written == {28} and shuffle.read == {3, 15}
    assert code[9].target == ".L_x_1" and code[4].labels == (".L_x_1",)


def test_counts_loads_before_the_first_use(code: sass.Code) -> None:
    # 0x30 reads R7 of the first two; the loop has three of 128 bits; what 0xa0 loads is overwritten and not read.
    assert sass.bursts(code, "LDG", "128") == [2, 3]
    assert sass.bursts(code, "LDG") == [2, 4]


def test_names_what_is_called(code: sass.Code) -> None:
    assert sass.calls(code) == ["__cuda_sm20_div_s64"]
    assert [i.address for i in sass.matching(code, "LDG", "CONSTANT")] == [0x40]
    assert sass.matching(code, "LD") == []


def test_refuses_what_is_no_listing(code: sass.Code) -> None:
    with pytest.raises(sass.SassError, match="no instruction"):
        sass.parse("nvdisasm fatal")
    with pytest.raises(sass.SassError, match="no kernel other; there are load<int>"):
        sass.kernel({"load<int>": code}, "other")
