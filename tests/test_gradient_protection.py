"""An update is a pure function: it differentiates when asked to, is cut where told to, and is left alone otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite

TARGET = jnp.array([1.0, -2.0, 0.0])


def loss(params):
    return jnp.sum((params - TARGET) ** 2)


def walk(tx, params, steps=3, protect=lambda g: g):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(protect(jax.grad(loss)(params)), state, params)
        params = optax.apply_updates(params, updates)
    return params


def after_steps(tx, params, steps=3, protect=lambda g: g):
    return loss(walk(tx, params, steps, protect))


START = jnp.array([0.5, 0.5, 0.0])  # the last gradient is exactly 0


def test_meta_gradient_is_finite_at_a_zero_gradient_with_eps_root():
    meta = jax.jit(jax.grad(lambda p: after_steps(adamite.adam(0.1, eps_root=1e-8), p)))(START)
    assert jnp.isfinite(meta).all()


def test_meta_gradient_is_nan_without_eps_root():
    """The derivative of the root at 0 is infinite; this is why eps_root exists."""
    meta = jax.jit(jax.grad(lambda p: after_steps(adamite.adam(0.1), p)))(START)
    assert jnp.isnan(meta[2])
    assert jnp.isfinite(meta[:2]).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", [adamite.adam, adamite.adamw, adamite.nadam])
def test_meta_gradients_are_the_finite_differences(recipe):
    with jax.enable_x64(True):
        start = jnp.array([0.5, 0.7, -0.3])

        def outcome(rate):
            return after_steps(recipe(rate, eps_root=1e-8), start)

        slope = (outcome(0.1 + 1e-6) - outcome(0.1 - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(outcome)(jnp.float64(0.1)), slope, rtol=1e-6)


def test_stop_gradient_cuts_the_meta_gradient():
    """With the gradients cut, updates are constants: d loss / d start is the loss's gradient where the walk ends."""
    tx = adamite.adam(0.1, eps_root=1e-8)
    cut = jax.grad(lambda p: after_steps(tx, p, 3, jax.lax.stop_gradient))(START)
    whole = jax.grad(lambda p: after_steps(tx, p, 3))(START)
    np.testing.assert_allclose(cut, jax.grad(loss)(walk(tx, START)), rtol=1e-5)
    assert np.abs(whole - cut).max() > 1e-3


def test_without_asking_nothing_differentiates_through_the_optimizer():
    """A probe between gradients and Adam counts its derivatives: none in a training step, some in a meta-gradient."""
    derivatives = []

    @jax.custom_jvp
    def probe(x):
        return x

    @probe.defjvp
    def _(primals, tangents):
        derivatives.append(1)
        return primals[0], tangents[0]

    tx = adamite.adam(0.1, eps_root=1e-8)
    jax.jit(lambda p: after_steps(tx, p, 2, probe))(START)
    assert not derivatives
    jax.grad(lambda p: after_steps(tx, p, 2, probe))(START)
    assert derivatives


def test_a_training_step_holds_one_gradient_of_the_loss():
    """The program of a step is the loss's gradient and Adam's lines: one backward pass, whatever the step count."""
    tx = adamite.adam(0.1)

    def step(params, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.sum(jnp.sin(p)))(params), state, params)
        return optax.apply_updates(params, updates), state

    jaxpr = str(jax.make_jaxpr(step)(START, tx.init(START)))
    assert jaxpr.count(" cos ") == 1
    assert jaxpr.count(" sqrt ") == 1
