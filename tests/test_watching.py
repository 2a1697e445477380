"""What guards, accumulation and telemetry have in common: programs that grow with the leaves, whole models, no NaN."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite import accumulate, engines, skip_nonfinite, skip_spikes, telemetry, with_telemetry
from adamite.core.skipping import all_finite
from bits import assert_same_bits
from engines.cases import QUICKLY

pytestmark = pytest.mark.few(2)

AROUND = {
    "skip_nonfinite": skip_nonfinite,
    "skip_spikes": lambda tx: skip_spikes(tx, window=4),
    "accumulate": lambda tx: accumulate(tx, 2),
    "accumulate(skip_nonfinite)": lambda tx: accumulate(skip_nonfinite(tx), 2),
    "with_telemetry": with_telemetry,
    "with_telemetry, every 3": lambda tx: with_telemetry(tx, every=3),
    "with_telemetry(accumulate(skip_spikes)), every 2": lambda tx: with_telemetry(
        accumulate(skip_spikes(tx, window=4), 2), every=2
    ),
}
IN_PLACE = [name for name in AROUND if "with_telemetry" not in name or name == "with_telemetry, every 3"]
"""What steps the state in place, whatever reads it before: but for telemetry of each step, and a trial of a branch."""
around = pytest.mark.parametrize("name", AROUND)


def one_device():
    """A mesh on which it is known where everything is, so that kernels are used."""
    return jax.make_mesh((1,), ("here",), axis_types=(jax.sharding.AxisType.Auto,))


def leaves(count):
    return [jax.ShapeDtypeStruct((64 + number, 256), jnp.float32) for number in range(count)]


def program(tx, count):
    """Equations, and XLA's program for a CPU."""
    params = leaves(count)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, jax.eval_shape(tx.init, params), params)
    return len(traced.jaxpr.eqns), traced.lower().compile().as_text()


@pytest.mark.more
@around
def test_programs_are_linear_in_leaves(name):
    """And have few loops, for each of which XLA's CPU compiler takes the same time; three of them are AdamW's."""
    tx = AROUND[name](adamite.adamw(1e-3))
    equations, texts = zip(*(program(tx, count) for count in (8, 16, 32)), strict=True)
    lines = [len(text.splitlines()) for text in texts]
    for size in (equations, lines):
        assert size[2] - size[1] == pytest.approx(2 * (size[1] - size[0]), rel=0.05)
    loops, copies = (len(re.findall(rf"\[\d+,256\]\S* {kind}\(", texts[2])) / 32 for kind in ("fusion", "copy"))
    assert loops <= (20 if "spikes)), every" in name else 9)
    if name in IN_PLACE:
        assert copies == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("shape", [(), (7,), (300, 256)])
def test_all_finite(dtype, shape):
    """The largest numbers are finite, and the sum of many is no infinity to it. One anywhere is seen, and a NaN."""
    large = jnp.full(shape, jnp.finfo(dtype).max, dtype)
    finite = jax.jit(lambda *arrays: all_finite([arrays], ()))
    for others in ((), (jnp.zeros(shape),)):
        assert finite(large, *others)
        for bad in (np.nan, np.inf, -np.inf):
            assert not finite(large.at[(-1,) * len(shape)].set(bad), *others)
        if shape:
            assert not finite(large.at[0].set(np.inf).at[-1].set(-np.inf), *others)
    assert finite(jnp.zeros((0, 3), dtype))
    assert all_finite([], ())


@pytest.mark.parametrize("engine", [None, "auto", "pallas"])
@around
def test_functions_of_a_whole_model_are_left_alone(name, engine):
    """They stand where gradients are None. The rest is stepped as without them."""
    tx, functions = AROUND[name](adamite.adamw(1e-2)), []
    with jax.set_mesh(one_device()):
        model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
        arrays = eqx.filter(model, eqx.is_inexact_array)
        grads = jax.tree.map(jnp.sin, arrays)

    def step(arrays, state, of):
        whole = eqx.combine(arrays, of)
        if engine is None:
            updates, state = tx.update(grads, state, whole)
            return eqx.apply_updates(arrays, updates), state
        new, state = tx.step(grads, state, whole, engine=engine)
        functions.extend([new.activation] if of is model else [])
        return eqx.filter(new, eqx.is_inexact_array), state

    with jax.set_mesh(one_device()):
        ends = []
        for of in (model, arrays):
            one = jax.jit(lambda arrays, state, of=of: step(arrays, state, of), compiler_options=QUICKLY)
            end = arrays, tx.init(arrays)
            for _ in range(4):
                end = one(*end)
            ends.append(end)
    assert_same_bits(*ends)
    assert all(function is model.activation for function in functions)
    assert bool(functions) == (engine is not None)
    assert not np.array_equal(ends[0][0].layers[0].weight, arrays.layers[0].weight)


TREES = {
    "an absent gradient": ({"w": jnp.ones(3), "b": jnp.ones(2)}, {"w": jnp.ones(3), "b": None}),
    "no leaves": ({}, {}),
    "no gradients": ({"w": jnp.ones(3)}, {"w": None}),
    "an empty leaf": ({"w": jnp.ones(3), "b": jnp.ones((0, 2))}, {"w": jnp.ones(3), "b": jnp.ones((0, 2))}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("tree", TREES)
@around
def test_no_nan_is_made(name, tree, jit, masked):
    params, grads = TREES[tree]
    inner = adamite.adamw(1e-2)
    tx = AROUND[name](optax.masked(inner, {key: key == "w" for key in params}) if masked else inner)
    with jax.debug_nans(True):
        state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
        for _ in range(4):
            updates, state = update(grads, state, params)
            params = jax.tree.map(lambda u, p: p if u is None else p + u, updates, params, is_leaf=lambda x: x is None)
        if "telemetry" in name:
            assert telemetry(state)["gradient_norm"] == pytest.approx(3**0.5) or tree in ("no leaves", "no gradients")


@around
def test_updates_of_another_dtype_than_the_gradients(name):
    """As where float32 weights have bfloat16 gradients."""
    wide = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda g, state, params=None: (jax.tree.map(lambda x: -0.1 * x.astype(jnp.float32), g), state),
    )
    tx, params = AROUND[name](wide), {"w": jnp.full(3, -0.0)}
    state = tx.init(params)
    for g in (1.0, np.nan, 1.0, np.nan):
        before = state
        updates, state = jax.jit(tx.update)({"w": jnp.full(3, g, jnp.bfloat16)}, state, params)
        assert updates["w"].dtype == jnp.float32
        if np.isnan(g) and "skip" in name and "accumulate" not in name:
            assert_same_bits(optax.apply_updates(params, updates), params)
            assert_same_bits(state.inner, before.inner)


@around
def test_steps_are_taken_by_the_engine_that_is_asked_for(name):
    tx = AROUND[name](adamite.adamw(1e-2))
    with jax.set_mesh(one_device()), engines.recorded() as choices:
        params = {"w": jnp.ones((16, 256))}
        jax.jit(lambda p, s: tx.step(p, s, p, engine="pallas")).trace(params, tx.init(params))
    assert {choice.engine for choice in choices} == {"pallas"}
