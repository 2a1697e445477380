"""Launches and bytes of programs for a GPU, read from their texts."""

import importlib.util
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"

# As XLA's GPU compiler writes it, without layouts and metadata; the names are shorter.
LOOP = """\
HloModule jit_loop, is_scheduled=true

%fused_update (param_0: f32[16,1024], param_1: pred[], param_2: s32[]) -> f32[16,1024] {
  %param_0 = f32[16,1024]{1,0} parameter(0)
  %param_1 = pred[] parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %there = pred[1,1024]{1,0} broadcast(%param_1), dimensions={}
  %row = f32[1,1024]{1,0} dynamic-slice(%param_0, %param_2, %zero), dynamic_slice_sizes={1,1024}
  %sin = f32[1,1024]{1,0} sine(%row)
  %new = f32[1,1024]{1,0} select(%there, %sin, %row)
  ROOT %updated = f32[16,1024]{1,0} dynamic-update-slice(%param_0, %new, %param_2, %zero)
}

%fused_add (param_0.1: s32[]) -> s32[] {
  %param_0.1 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add = s32[] add(%param_0.1, %one)
}

%body (arguments: (s32[], f32[16,1024])) -> (s32[], f32[16,1024]) {
  %arguments = (s32[], f32[16,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arguments), index=0
  %x = f32[16,1024]{1,0} get-tuple-element(%arguments), index=1
  %true = pred[] constant(true)
  %update_fusion = f32[16,1024]{1,0} fusion(%x, %true, %i), kind=kLoop, calls=%fused_update
  %add_fusion = s32[] fusion(%i), kind=kLoop, calls=%fused_add, control-predecessors={%update_fusion}
  ROOT %both = (s32[], f32[16,1024]{1,0}) tuple(%add_fusion, %update_fusion)
}

%condition (arguments.1: (s32[], f32[16,1024])) -> pred[] {
  %arguments.1 = (s32[], f32[16,1024]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arguments.1), index=0
  %last = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

ENTRY %main (x.1: f32[16,1024]) -> f32[16,1024] {
  %begin = s32[] constant(0)
  %copy = s32[] copy(%begin)
  %x.1 = f32[16,1024]{1,0} parameter(0), sharding={replicated}
  %start = (s32[], f32[16,1024]{1,0}) tuple(%copy, %x.1)
  %while = (s32[], f32[16,1024]{1,0}) while(%start), condition=%condition, body=%body, backend_config=@COUNT@
  ROOT %end = f32[16,1024]{1,0} get-tuple-element(%while), index=1
}
"""
COUNT = '{"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}'

BRANCHES = """\
%fused_part (param_0: f32[16,1024]) -> f32[16,8] {
  %param_0 = f32[16,1024]{1,0} parameter(0)
  %slice = f32[16,8]{1,0} slice(%param_0), slice={[0:16], [0:8]}
  ROOT %double = f32[16,8]{1,0} add(%slice, %slice)
}

%part (of: (f32[16,1024])) -> (f32[16,8]) {
  %of = (f32[16,1024]{1,0}) parameter(0)
  %x = f32[16,1024]{1,0} get-tuple-element(%of), index=0
  %part_fusion = f32[16,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_part
  ROOT %result = (f32[16,8]{1,0}) tuple(%part_fusion)
}

%all (of.1: (f32[16,1024])) -> (f32[16,8]) {
  %of.1 = (f32[16,1024]{1,0}) parameter(0)
  %x.1 = f32[16,1024]{1,0} get-tuple-element(%of.1), index=0
  %negated = f32[16,1024]{1,0} negate(%x.1)
  %cut = f32[16,8]{1,0} slice(%negated), slice={[0:16], [0:8]}
  ROOT %result.1 = (f32[16,8]{1,0}) tuple(%cut)
}

ENTRY %main (s: pred[], x.2: f32[16,1024]) -> f32[16,8] {
  %s = pred[] parameter(0)
  %x.2 = f32[16,1024]{1,0} parameter(1)
  %given = (f32[16,1024]{1,0}) tuple(%x.2)
  %either = (f32[16,8]{1,0}) conditional(%s, %given, %given), @BRANCHES@
  ROOT %end = f32[16,8]{1,0} get-tuple-element(%either), index=0
}
"""

# A step in place by a custom call, inside of a command buffer: weights, moments and their scales are read and written.
CALL = """\
%command_buffer (w: u32[12], p: bf16[64,256], m: s8[64,256], s: f32[64,1]) -> (bf16[64,256], s8[64,256], f32[64,1]) {
  %w = u32[12]{0} parameter(0)
  %p = bf16[64,256]{1,0} parameter(1)
  %m = s8[64,256]{1,0} parameter(2)
  %s = f32[64,1]{1,0} parameter(3)
  ROOT %step = (bf16[64,256]{1,0}, s8[64,256]{1,0}, /*index=2*/f32[64,1]{1,0}) custom-call(%w, %p, %m, %s), \
custom_call_target="adamite_gpu_step", output_to_operand_aliasing={{0}: (1, {}), {1}: (2, {}), {2}: (3, {})}
}

ENTRY %main (w.1: u32[12], p.1: bf16[64,256], m.1: s8[64,256], s.1: f32[64,1]) -> (bf16[64,256], s8[64,256]) {
  %w.1 = u32[12]{0} parameter(0)
  %p.1 = bf16[64,256]{1,0} parameter(1)
  %m.1 = s8[64,256]{1,0} parameter(2)
  %s.1 = f32[64,1]{1,0} parameter(3)
  ROOT %call = (bf16[64,256]{1,0}, s8[64,256]{1,0}, f32[64,1]{1,0}) call(%w.1, %p.1, %m.1, %s.1), \
to_apply=%command_buffer
}
"""


@pytest.fixture(scope="module")
def launches():
    sys.path.insert(0, str(FOLDER))
    try:
        specification = importlib.util.spec_from_file_location("hlo_launches", FOLDER / "hlo_launches.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module.launches


def test_a_loop_counts_as_often_as_it_runs_and_what_is_updated_in_place_by_its_rows(launches):
    row, flag, index = 4 * 1024, 1, 4
    assert [(one.name, one.times, one.moved) for one in launches(LOOP.replace("@COUNT@", COUNT))] == [
        ("update_fusion", 4, 4 * (2 * row + flag + index)),
        ("add_fusion", 4, 4 * 2 * index),
        ("copy", 1, 2 * index),
    ]


def test_a_loop_of_unknown_length_is_no_number(launches):
    with pytest.raises(ValueError, match="%while"):
        launches(LOOP.replace("@COUNT@", "{}"))


@pytest.mark.parametrize(
    "branches", ["true_computation=%part, false_computation=%all", "branch_computations={%all, %part}"]
)
def test_of_branches_that_which_moves_most_counts(launches, branches):
    whole, part = 4 * 16 * 1024, 4 * 16 * 8
    assert [(one.name, one.moved) for one in launches(BRANCHES.replace("@BRANCHES@", branches))] == [
        ("negated", 2 * whole),
        ("cut", 2 * part),
    ]


def test_a_fusion_reads_what_it_slices(launches):
    text = BRANCHES.replace("@BRANCHES@", "branch_computations={%part, %part}")
    assert [(one.name, one.moved) for one in launches(text)] == [("part_fusion", 2 * 4 * 16 * 8)]


def test_a_custom_call_reads_all_operands_and_writes_all_results_once(launches):
    (only,) = launches(CALL)
    n = 64 * 256
    assert (only.operation, only.times, only.moved) == ("custom-call", 1, 12 * 4 + 2 * (2 * n + n + 4 * 64))
