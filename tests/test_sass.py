"""The fast path of a kernel, found in its machine code."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "sass.py"

# As nvdisasm writes it: before the loop a division by a number, with a slow way for what is subnormal. In the loop 16
# bytes are loaded at once, or up to four times 4; then stored in the same way; and lane 0 stores a scale.
CODE = """\
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
	.section	.text.step,"ax",@progbits
        .type           step,@function
step:
.text.step:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.RCP R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$division) ;
.L_x_0:
        /*0040*/                   MOV R4, R2 ;
.L_x_1:
        /*0050*/               @P3 EXIT ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/                   LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/               @P4 LDG.E R8, desc[UR4][R6.64] ;
        /*00a0*/               @P4 LDG.E R9, desc[UR4][R6.64+0x4] ;
        /*00b0*/               @P4 LDG.E R10, desc[UR4][R6.64+0x8] ;
        /*00c0*/               @P4 LDG.E R11, desc[UR4][R6.64+0xc] ;
.L_x_3:
        /*00d0*/                   FMUL R8, R8, R4 ;
        /*00e0*/                   LOP3.LUT R9, R9, R10, RZ, 0xc0, !PT ;
        /*00f0*/                   BSSY B0, `(.L_x_6) ;
        /*0100*/              @!P1 BRA P2, `(.L_x_4) ;
        /*0110*/               @P1 STG.E.128 desc[UR4][R6.64], R8 ;
.L_x_4:
        /*0120*/               @P1 BRA `(.L_x_5) ;
        /*0130*/                   STG.E.U8 desc[UR4][R6.64], R8 ;
        /*0140*/                   STG.E.U8 desc[UR4][R6.64+0x1], R9 ;
.L_x_5:
        /*0150*/                   BSYNC B0 ;
.L_x_6:
        /*0160*/               @P5 BRA `(.L_x_7) ;
        /*0170*/                   STG.E desc[UR4][R12.64], R14 ;
.L_x_7:
        /*0180*/                   UISETP.NE.AND UP0, UPT, UR5, 0x2, UPT ;
        /*0190*/                   BRA.U UP0, `(.L_x_1) ;
        /*01a0*/                   EXIT ;
        .type           $__internal_0_$division,@function
$__internal_0_$division:
        /*01b0*/                   FADD R2, R2, R3 ;
        /*01c0*/                   RET.REL.NODEC R4 `(step) ;
.L_x_8:
        /*01d0*/                   BRA `(.L_x_8) ;
"""
BEFORE, LOOP = 4, 15


@pytest.fixture(scope="module")
def sass():
    specification = importlib.util.spec_from_file_location("sass", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_fast_path_takes_vectors_and_no_slow_division(sass):
    code = sass.instructions(CODE, "step")
    found = sass.fast_path(code, elements=4, turns=2, moved=(16, 20))
    assert found["accesses"] == {"LDG.E.128": 1, "STG.E": 1, "STG.E.128": 1}
    assert found["memory accesses"] == 3
    assert found["instructions per element"] == (LOOP + BEFORE / 2) / 4
    pipes = {"fma": 0.25, "alu": 0.25, "half": 0, "special": 0, "memory": 0.75, "other": (LOOP - 5) / 4}
    assert found["pipes"] == pipes


def test_without_a_loop_all_turns_stand_behind_one_another(sass):
    code = [x for x in sass.instructions(CODE, "step") if x.name != "BRA.U"]
    found = sass.fast_path(code, elements=2, turns=2, moved=(8, 10))  # 16 bytes are read and 20 written all the same
    assert found["instructions per element"] == (BEFORE + LOOP - 1 + 1) / 4  # it ends with EXIT
    assert found["memory accesses"] == 3


def test_a_kernel_that_moves_less_than_it_must_has_no_fast_path(sass):
    code = sass.instructions(CODE, "step")
    with pytest.raises(ValueError, match="no path"):
        sass.fast_path(code, elements=4, turns=2, moved=(32, 20))


def test_what_issues_slowly_takes_longer_than_the_memory(sass):
    pipes = dict.fromkeys(sass.LANES, 0.0)
    figures = {"instructions per element": 128.0, "pipes": pipes}
    clocks = 1 / (132 * 1.755e9)  # an element a clock in each multiprocessor
    assert sass.time_of_issue(figures, 10.0, "H100") == pytest.approx(clocks / (10 / 3.0e12))
    figures = {"instructions per element": 128.0, "pipes": pipes | {"special": 32.0}}  # 16 lanes: two clocks
    assert sass.time_of_issue(figures, 10.0, "H100") == pytest.approx(2 * clocks / (10 / 3.0e12))


@pytest.mark.parametrize(("registers", "share"), [(32, 1.0), (40, 0.75), (64, 0.5), (65, 0.375), (128, 0.25)])
def test_registers_bound_the_warps_at_once(sass, registers, share):
    assert sass.occupancy(registers, warps=8) == share
