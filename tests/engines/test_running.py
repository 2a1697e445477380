"""What is decided when a step is run: what a step closes over, and what is said where it is slow."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.engines import choice, running
from adamite.engines.closures import closed_over

PARAMS = {"w": jnp.ones((64, 256)), "b": jnp.ones(3)}


@pytest.fixture
def without_library(monkeypatch):
    """As where adamite-native is not installed, and nothing was said yet."""
    for module in (choice, running):
        monkeypatch.setattr(module, "library", lambda: None)
    running._warn_once.cache_clear()
    yield
    running._warn_once.cache_clear()


def said(tx, way, engine="auto"):
    """What a step warns of."""
    state = tx.init(PARAMS)
    step = {
        "step": lambda g, s, p: tx.step(g, s, p, engine=engine),
        "update": lambda g, s, p: tx.update(g, s, p, engine=engine),
    }[way]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(step)(PARAMS, state, PARAMS)
        jax.jit(lambda *of: step(*of))(PARAMS, state, PARAMS)
        step(PARAMS, state, PARAMS)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("way", ["step", "update"])
def test_lean_moments_without_the_library_are_told_once(without_library, way):
    (message,) = said(adamite.adamw(1e-3, moments="int8"), way)
    assert message.startswith("adamite-native is not installed: XLA steps moments of few bits")
    assert "pip install adamite[native]" in message


@pytest.mark.parametrize("way", ["step", "update"])
def test_nothing_is_told_where_nothing_is_slow_or_xla_was_asked_for(without_library, way):
    assert said(adamite.adamw(1e-3), way) == []
    assert said(adamite.adamw(1e-3, moments="int8"), way, "xla") == []


def test_another_platform(without_library):
    """A step that is lowered for a TPU wants no library for CPUs."""
    tx = adamite.adamw(1e-3, moments="int8")
    trace = jax.jit(tx.step).trace(PARAMS, tx.init(PARAMS), PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "tpu_custom_call" in trace.lower(lowering_platforms=("tpu",)).as_text()


def test_arrays_are_found_wherever_a_function_has_them():
    x, y, z, u, v = (jnp.float32(i) for i in range(5))

    class Holder:
        def __init__(self):
            self.array = z

        def method(self):
            return self.array

    def function(a=u, *, b=v):
        return x + a + b

    found = closed_over((functools.partial(function, y), {"holder": [Holder().method]}, jnp.sum, np))
    assert {int(array) for array in found} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("moments", "rtol"), [("int8", 1e-4), ("bfloat16", 1e-2)])
def test_what_a_step_closes_over_is_an_argument(moments, rtol):
    """`optax.inject_hyperparams` builds rules around traced numbers."""
    make = optax.inject_hyperparams(adamite.adamw, static_args="moments")
    tx, plain = make(1e-2, b1=0.8, moments=moments), adamite.adamw(1e-2, b1=0.8, moments=moments)
    state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(PARAMS, state, PARAMS)
        expected, plain_state = jax.jit(plain.update)(PARAMS, plain_state, PARAMS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), updates, expected)
    assert step._cache_size() == 1


def test_derivatives_by_what_a_step_closes_over():
    def loss(b1, engine):
        tx = adamite.adamw(1e-2, b1=b1, moments="bfloat16")
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, engine=engine)
        updates, _ = tx.update(jax.tree.map(lambda p: -2 * p, PARAMS), state, PARAMS, engine=engine)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    one = jax.make_mesh((1,), ("here",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(one):
        ours, plain = (jax.jit(jax.grad(functools.partial(loss, engine=engine)))(0.8) for engine in ("auto", "xla"))
    assert abs(plain) > 0.1
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
