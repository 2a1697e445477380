"""Derivatives through whole steps: a rounding passes them straight through, as a cast does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.rounding import NAMES, nearest, spacing, stochastic

MOMENTS = ("float32", "bfloat16", "int8", ("bfloat16", "float8"))
ROUNDINGS = (None, *NAMES)
START = np.linspace(0.5, 2, 16 * 256, dtype=np.float32).reshape(16, 256)
RATE, STEPS = 1e-2, 4

pytestmark = pytest.mark.few(6)

each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
each_moments = pytest.mark.parametrize("moments", MOMENTS, ids=str)
ways = pytest.mark.parametrize("way", ["update", "step"])


def trained(rate, how, way, gradient, dtype):
    """The mean of the weights after some steps."""
    tx, params = adamite.adamw(rate, **how), jnp.asarray(START, dtype)
    state = tx.init(params)
    for _ in range(STEPS):
        g = gradient(params)
        if way == "step":
            params, state = tx.step(g, state, params)
        else:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
    return jnp.mean(params.astype(jnp.float32))


def hypergradient(how, way, gradient, dtype=jnp.bfloat16):
    return float(jax.jit(jax.grad(lambda rate: trained(rate, how, way, gradient, dtype)))(RATE))


def constant(params):
    return jnp.ones_like(params)


def of_a_bowl(params):
    return 2 * (params - 3)


@each_rounding
@each_moments
@ways
def test_constant_gradients_give_the_derivative_of_float32(moments, rounding, way):
    """Each step moves by the rate: the derivative is minus the number of steps, and what the decay adds."""
    expected = hypergradient({}, "update", constant, jnp.float32)
    assert expected == pytest.approx(-STEPS, rel=1e-2)
    ours = hypergradient({"moments": moments, "rounding": rounding}, way, constant)
    assert ours == pytest.approx(expected, rel=1e-3)


@each_rounding
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@ways
def test_derivatives_pass_through_the_moments(moments, rounding, way):
    """Gradients depend on the weights, and so do the moments that floating numbers keep."""
    expected = hypergradient({}, "update", of_a_bowl, jnp.float32)
    ours = hypergradient({"moments": moments, "rounding": rounding}, way, of_a_bowl)
    assert ours == pytest.approx(expected, rel=2e-2)


@each_rounding
def test_by_the_weights_it_is_that_of_the_unrounded_step(rounding):
    """The new weight moves with the old one, at a rate of one less the decay."""
    tx = adamite.adamw(0.5, weight_decay=0.25, rounding=rounding)

    def after(p):
        params = p.astype(jnp.bfloat16)
        updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
        return optax.apply_updates(params, updates).astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.grad(after)(jnp.asarray([1.0, -3.0, 0.3])), 1 - 0.5 * 0.25, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_rounding_has_the_derivative_of_a_cast(dtype):
    x, bits = jnp.asarray([1.3, -2.7, 1e-3, 0.0]), jnp.asarray([0, 2**31, 2**32 - 1, 7], jnp.uint32)
    for rounded in (lambda x: nearest(x, dtype), lambda x: stochastic(x, dtype, bits)):
        np.testing.assert_array_equal(jax.grad(lambda x: rounded(x).sum())(x), np.ones(4))  # noqa: B023
    assert (spacing(x, dtype) > 0).all()
