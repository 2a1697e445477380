"""With 64-bit types enabled, float32 stays float32 throughout, with Optax's bits, in every storage and engine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite import rounding
from bits import assert_same_bits, trajectory
from specs import SPECS

pytestmark = pytest.mark.few(2)

SHAPE = (16, 256)
FULL = [spec for spec in SPECS if spec.full]
DRIFTS = ("radam",)  # optax's rectification is a float64 there, and so is what it multiplies
SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
LEAN = {
    "adamw": lambda **kw: adamite.adamw(SCHEDULE, weight_decay=0.1, **kw),
    "amsgrad": lambda **kw: adamite.amsgrad(1e-2, **kw),
    "lamb": lambda **kw: adamite.lamb(1e-2, **kw),
    "lion": lambda **kw: adamite.lion(1e-2, **kw),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def values(seed, dtype=jnp.float32, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dtypes_of_full_size(closed):
    """Of all arrays of the leaf's size in a program, those in nested programs too."""
    found = set()
    for eqn in closed.eqns:
        found |= {x.aval.dtype.name for x in (*eqn.invars, *eqn.outvars) if getattr(x.aval, "shape", None) == SHAPE}
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found |= dtypes_of_full_size(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("spec", FULL, ids=str)
def test_float32_stays_float32(spec):
    tx, params = spec.build(**spec.flags[-1]), values(0)
    state = tx.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}
    program = jax.make_jaxpr(tx.update)(values(1), state, params)
    assert "float64" not in dtypes_of_full_size(program)
    assert [x.dtype for x in program.out_avals] == [x.dtype for x in jax.tree.leaves((params, state))]


@pytest.mark.parametrize("spec", [spec for spec in FULL if spec.twin and spec.name not in DRIFTS], ids=str)
def test_the_bits_are_optax_s(spec):
    params, gradients = values(0, shape=(4, 5)), values(1, shape=(20, 4, 5))
    (ours, states), (theirs, their_states) = (
        trajectory(tx, params, gradients)[1] for tx in (spec.build(), spec.build_twin())
    )
    assert_same_bits(states, their_states)
    if spec.name == "lamb":  # its norms are sums, which are not in one order
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-9)
    else:
        assert_same_bits(ours, theirs)


MOMENTS = ("float32", "bfloat16", "int8")
WEIGHTS = (jnp.float32, jnp.float64, jnp.bfloat16)


def steps(tx, dtype, update):
    params = values(0, dtype)
    state = tx.init(params)
    types = jax.tree.map(lambda x: x.dtype, state)
    for seed in (1, 2):
        updates, state = update(values(seed, dtype), state, params)
        params = optax.apply_updates(params, updates)
    assert params.dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, state) == types
    assert jnp.isfinite(params).all()
    return params


@pytest.mark.parametrize(("recipe", "moments"), [*itertools.product(LEAN, MOMENTS)])
def test_every_storage_steps_every_width(recipe, moments):
    """And as without 64-bit types, where weights have no more than 32 bits."""
    for dtype in WEIGHTS:
        tx = LEAN[recipe](moments=moments)
        params = steps(tx, dtype, jax.jit(tx.update))
        if dtype != jnp.float64:
            with jax.enable_x64(False):
                np.testing.assert_allclose(params, steps(tx, dtype, jax.jit(tx.update)), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", rounding.NAMES)
@pytest.mark.parametrize("eager", [False, True])
def test_every_rounding(name, eager):
    tx = adamite.adamw(SCHEDULE, rounding=name)
    steps(tx, jnp.bfloat16, tx.update if eager else jax.jit(tx.update))


@pytest.mark.parametrize("engine", ["xla", "pallas", "auto"])
def test_every_engine(engine):
    """Native kernels, where they are installed, are "auto" on a CPU."""
    for moments, how in (("float32", None), ("int8", "residual8"), ("bfloat16", "stochastic")):
        tx = adamite.adamw(SCHEDULE, moments=moments, rounding=how)
        params = values(0, jnp.bfloat16 if how else jnp.float32)
        state = tx.init(params)

        @jax.jit
        def step(params, state, g, tx=tx):
            return tx.step(g, state, params, engine=engine)

        with jax.enable_x64(False):
            report = adamite.memory_report(tx, params, engine=engine)
            expected = step(params, state, values(1, params.dtype))
        assert adamite.memory_report(tx, params, engine=engine) == report
        after = step(params, state, values(1, params.dtype))
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, (params, state))
        np.testing.assert_allclose(after[0].astype("f4"), expected[0].astype("f4"), rtol=1e-2, atol=1e-6)
