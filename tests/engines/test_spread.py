"""A kernel on each device's part of a leaf: the numbers, and the random bits, of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from engines.cases import adamw, assert_close, by, tree

pytestmark = pytest.mark.few(1)

SPECS = {
    "rows": ((64, 300), P("data")),
    "rows over both": ((64, 300), P(("data", "model"))),
    "columns": ((33, 2048), P(None, "model")),
    "both": ((64, 1024), P("data", "model")),
    "the first of three": ((4, 33, 300), P("data")),
    "three": ((4, 8, 512), P(None, "data", "model")),
    "one axis": ((8192,), P("data")),
    "nothing": ((20, 300), P()),
}
MORE = ("rows over both", "the first of three", "one axis")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])


def told(tx, params):
    """What takes the one leaf."""
    with adamite.engines.recorded() as choices:
        jax.eval_shape(functools.partial(tx.step, engine="pallas"), params, tx.init(params), params)
    return choices[0]


@pytest.mark.parametrize("rounding", [pytest.param(None, marks=pytest.mark.slow), "residual8"])
@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * (x in MORE)) for x in SPECS])
def test_results_are_those_of_one_device(mesh, case, rounding):
    shape, spec = SPECS[case]
    dtype = jnp.bfloat16 if rounding else jnp.float32
    params, grads = tree([shape], 0, dtype), tree([shape], 1, dtype)
    tx = adamw("int8", rounding)
    laid, laid_grads = jax.device_put((params, grads), NamedSharding(mesh, spec))
    assert told(tx, laid).engine == "pallas"
    step = jax.jit(functools.partial(tx.step, engine="pallas"))
    new, state = step(laid_grads, tx.init(laid), laid)
    assert new[0].sharding.is_equivalent_to(laid[0].sharding, len(shape))
    assert_close(jax.device_get((new, state)), jax.device_get(by(None, tx)(params, tx.init(params), grads)))


def test_blocks_that_are_cut_are_left_to_xla(mesh):
    params = jax.device_put(tree([(32, 300)]), NamedSharding(mesh, P(None, "model")))
    why = "its last axis is cut into 2 parts, in which blocks of 256 are not whole"
    assert told(adamw("int8"), params)[1:] == ("xla", why)
    assert told(adamw("float32"), params).engine == "pallas"


def test_in_shard_map_each_device_steps_what_it_has():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    tx, params = adamw("float32"), tree([(64, 300)])
    state = tx.init(params)
    over = [P("data")]
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(over, specs, over), out_specs=(over, specs), check_vma=False)
    def step(params, state, grads):
        return tx.step(grads, state, params, engine="pallas")

    assert_close(jax.device_get(step(params, state, params)), jax.device_get(by(None, tx)(params, state, params)))


def test_pmap():
    tx, params = adamw("float32"), tree([(2, 8, 300)])
    state = jax.pmap(tx.init)(params)
    new, _ = jax.pmap(functools.partial(tx.step, engine="pallas"))(params, state, params)
    one = [params[0][1]]
    assert_close(([new[0][1]], ()), (by(None, tx)(one, tx.init(one), one)[0], ()))
