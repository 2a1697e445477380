"""Zeros made beside a parameter have its sharding: a table, for under jit that rests on what a compiler does.

`jnp.where(False, parameter, zeros)` must tie both on every JAX that is supported. If a row fails on a new JAX, look in
`adamite.core.placement`.
"""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from adamite.core.placement import beside

AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
HOW = ("eager", "jit", "jit under set_mesh")
SPECS = (P("data", None), P("data", "model"), P(None, "model"), P(("data", "model"), None))
SHAPE, BLOCKS = (64, 512), (64, 4)
KINDS = {"moments": (SHAPE, jnp.float32), "codes": (SHAPE, jnp.int8), "scales": (BLOCKS, jnp.float32)}


def mesh_of(axes):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AXES[axes],) * 2)


def fresh(shape, dtype):
    """As a storage makes them: of the parameter's shape by `full_like`, others by `full`."""
    return lambda p: beside(p, jnp.full_like(p, 0, dtype) if shape == SHAPE else jnp.full(shape, 0, dtype))


@pytest.mark.parametrize(("axes", "how", "kind"), [*itertools.product(AXES, HOW, KINDS)])
def test_zeros_are_sharded_as_their_parameter(axes, how, kind):
    mesh, make = mesh_of(axes), fresh(*KINDS[kind])
    for spec in SPECS:
        sharding = NamedSharding(mesh, spec)
        parameter = jax.device_put(jnp.full(SHAPE, jnp.nan), sharding)
        with jax.set_mesh(mesh) if "set_mesh" in how else contextlib.nullcontext():
            zeros = (make if how == "eager" else jax.jit(make))(parameter)
        assert zeros.sharding.is_equivalent_to(sharding, 2), (spec, zeros.sharding)
        assert zeros.dtype == KINDS[kind][1]
        np.testing.assert_array_equal(zeros, 0)  # also beside NaN


def test_blocks_that_no_mesh_divides_are_whole_on_each_device():
    """Of 200 columns a block of 128 leaves 72: the scales, two, are cut along the rows alone."""
    mesh = mesh_of("Auto")
    parameter = jax.device_put(jnp.ones((64, 200)), NamedSharding(mesh, P("data", None)))
    scales = jax.jit(lambda p: beside(p, jnp.ones((64, 2))))(parameter)
    assert scales.sharding.is_equivalent_to(parameter.sharding, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameter_is_not_read(kind):
    """A program that makes zeros writes them, and moves nothing else."""
    mesh, make = mesh_of("Auto"), fresh(*KINDS[kind])
    sharding = NamedSharding(mesh, P("data", "model"))
    abstract = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
    cost = jax.jit(make).lower(abstract).compile().cost_analysis()
    shape, dtype = KINDS[kind]
    written = np.prod(shape) * jnp.dtype(dtype).itemsize / 8
    assert cost["bytes accessed"] <= written + 16  # one number to spread
