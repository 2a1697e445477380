"""With 64-bit types enabled, float32 stays float32 throughout, with Optax's bits, in every storage and engine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite import engines, rounding
from adamite.engines.native.library import library
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


WRAPPED = {
    "skip_nonfinite": lambda: adamite.skip_nonfinite(adamite.adam(SCHEDULE)),
    "skip_spikes": lambda: adamite.skip_spikes(adamite.adam(SCHEDULE)),
    "accumulate": lambda: adamite.accumulate(adamite.adam(1e-2), 2),
    "with_telemetry": lambda: adamite.with_telemetry(adamite.adamw(SCHEDULE)),
    "with_ema": lambda: adamite.with_ema(adamite.adamw(SCHEDULE), optax.linear_schedule(0.9, 0.99, 4)),
    "with_ema, bfloat16": lambda: adamite.with_ema(adamite.adamw(SCHEDULE), storage="bfloat16"),
    "cautious": lambda: adamite.chain(
        adamite.cautious(adamite.scale_by_adam()), adamite.scale_by_learning_rate(SCHEDULE)
    ),
    "regularization": lambda: adamite.chain(
        adamite.add_l1(SCHEDULE),
        adamite.adam(1e-2),
        adamite.soft_threshold(SCHEDULE),
        adamite.add_decayed_weights(SCHEDULE, after_learning_rate=True),
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adamite.adamw)(SCHEDULE),
    "a hyperparameter from a Python number": lambda: adamite.adam(1e-2, b1=jnp.asarray(0.9)),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_stands_around_stays_float32_too(case):
    tx, params = WRAPPED[case](), values(0)
    state = tx.init(params)
    program = jax.make_jaxpr(tx.update)(values(1), state, params)
    assert "float64" not in dtypes_of_full_size(program)
    assert [x.dtype for x in program.out_avals] == [x.dtype for x in jax.tree.leaves((params, state))]


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_float64_hyperparameter_changes_no_type(moments):
    """It is computed with in float64: that is what it asks for."""
    tx = adamite.lion(1e-2, b1=jnp.asarray(np.float64(0.9)), moments=moments, rounding="residual8")
    steps(tx, jnp.bfloat16, jax.jit(tx.update))


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


@pytest.mark.parametrize("engine", ["xla", "pallas", "native"])
@pytest.mark.parametrize(("moments", "how"), [("float32", None), ("int8", "residual8"), ("bfloat16", "stochastic")])
def test_every_engine(engine, moments, how):
    """On one device, where kernels take leaves; the same ones as without 64-bit types."""
    tx, dtype = adamite.adamw(SCHEDULE, moments=moments, rounding=how), jnp.bfloat16 if how else jnp.float32
    one_device = jax.make_mesh((1,), ("here",), axis_types=(jax.sharding.AxisType.Auto,))

    def step():
        with jax.set_mesh(one_device), engines.recorded() as choices:
            params, g = values(0, dtype), values(1, dtype)
            before = params, tx.init(params)
            after = jax.jit(lambda p, s, g: tx.step(g, s, p, engine=engine))(*before, g)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
        return after[0].astype(jnp.float32), {choice.engine for choice in choices}

    wide, taken = step()
    with jax.enable_x64(False):
        expected, expected_taken = step()
    assert taken == expected_taken
    assert taken <= {engine if engine != "native" or library() else "xla"}
    np.testing.assert_allclose(wide, expected, rtol=1e-2, atol=1e-6)
