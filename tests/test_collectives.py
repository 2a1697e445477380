"""What devices send each other, read from a program's text."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import AxisType

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"

# As the TPU compiler writes it, without layouts.
TEXT = """\
%all-reduce-scatter.1 (input.1: f32[16,8]) -> f32[2,8] {
  %all-reduce.3 = f32[16,8] all-reduce(%input.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
%start (p: f32[2,8]) -> (f32[2,8], f32[16,8]) {
  %all-gather.1 = f32[16,8] all-gather(%p), channel_id=2, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
}
%done (p: f32[2,8]) -> f32[16,8] {
  %all-gather.2 = f32[16,8] all-gather(%p), channel_id=2, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
}
ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %all-reduce.4 = (f32[8], f32[]) all-reduce(%x, %y), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %reduce-scatter.1 = bf16[4,8] reduce-scatter(%z), channel_id=4, replica_groups={{0,1},{2,3}}, dimensions={0}
  %permute = s8[32] collective-permute(%w), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""


@pytest.fixture(scope="module")
def collectives():
    sys.path.insert(0, str(FOLDER))
    try:
        specification = importlib.util.spec_from_file_location("collectives", FOLDER / "collectives.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module.collectives


def test_each_exchange_is_counted_once_and_by_its_kind(collectives):
    found = collectives(TEXT)
    assert [(one.kind, one.size, one.devices, one.sent) for one in found] == [
        ("reduce-scatter", 512, 8, 448.0),
        ("all-gather", 512, 8, 448.0),
        ("all-reduce", 36, 4, 54.0),
        ("reduce-scatter", 128, 2, 64.0),
        ("collective-permute", 32, 1, 32),
    ]


def test_of_a_program_that_was_compiled_here(collectives):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    total = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    (only,) = collectives(jax.jit(total).lower(jnp.ones((8, 100))).compile().as_text())
    assert (only.kind, only.size, only.devices, only.sent) == ("all-reduce", 400, 8, 700.0)
