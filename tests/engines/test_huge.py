"""Leaves of more than 2^31 elements: no array of them is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite.engines import Leaf, pallas
from adamite.engines.leaf_step import Place, first_of_row
from adamite.engines.native.library import library
from engines.cases import adamw, by

SHAPES = [(2**17, 2**16 + 1), (3, 2**31 + 5), (5, 2**15 + 1, 2**17)]


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("engine", ["xla", "pallas", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_has_types(shape, engine):
    one_device = jax.make_mesh((1,), ("here",), axis_types=(AxisType.Explicit,))
    tx, here = adamw("int8", "stochastic"), NamedSharding(one_device, P())
    params = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)]
    state = jax.eval_shape(tx.init, params)
    with adamite.engines.recorded() as choices:
        new, then = jax.eval_shape(lambda g, s, p: tx.step(g, s, p, engine=engine), params, state, params)
    assert types((new, then)) == types((params, state))
    if engine == "pallas":
        assert choices[0].engine == "pallas"
        assert types(jax.eval_shape(by(pallas, tx), params, state, params)) == types((params, state))
    elif engine == "native" and library():
        assert choices[0].engine == "native"


@pytest.mark.parametrize("shape", [*SHAPES, (7, 11, 13, 17)], ids=str)
def test_numbers_of_elements_are_right_modulo_2_32(shape):
    """Of the whole leaf, and of one of 2 x 2 x ... parts of it."""
    rng = np.random.default_rng(0)
    part = tuple(max(1, n // 2) for n in shape[:-1]) + shape[-1:]
    for its, place in ((shape, None), (part, Place(shape, jnp.uint32(0)))):
        leaf = Leaf(0, jax.ShapeDtypeStruct(its, jnp.float32), None, None, jnp.float32, place)
        for _ in range(20):
            *leading, row = (int(rng.integers(n)) for n in its[:-1])
            lead = int(np.ravel_multi_index(leading, its[:-2])) if leading else 0
            wanted = 0
            for index, length in zip((*leading, row, 0), shape, strict=True):
                wanted = wanted * length + index
            assert int(first_of_row(leaf, jnp.uint32(row), jnp.uint32(lead))) == wanted % 2**32
