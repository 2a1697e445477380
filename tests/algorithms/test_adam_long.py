"""A million steps of Adam in float32 stay with float64, and the count that cannot grow any more stays where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamite

STEPS, SIZE = 10**6, 64
RNG = np.random.default_rng(0)
THETA = RNG.standard_normal(SIZE).astype(np.float32)
TABLE = (RNG.standard_normal((1009, SIZE)) + 0.02).astype(np.float32)  # a prime number of them, over and over


def walk(dtype):
    tx = adamite.adam(1e-3)

    @jax.jit
    def run(theta, table):
        def step(carry, t):
            theta, state = carry
            updates, state = tx.update(table[t % len(TABLE)] * (1 + (t // len(TABLE)) % 7), state)
            return (optax.apply_updates(theta, updates), state), None

        (theta, state), _ = jax.lax.scan(step, (theta, tx.init(theta)), jnp.arange(STEPS))
        return theta, state[0].count

    theta, count = run(jnp.asarray(THETA, dtype), jnp.asarray(TABLE, dtype))
    assert count == STEPS
    return np.asarray(theta, np.float64)


def test_a_million_steps_stay_within_1e_4_of_the_displacement():
    """Weights go as far as 80 here. With weights of 200 their own rounding alone makes it 1.2e-4."""
    with jax.enable_x64(True):
        exact = walk(jnp.float64)
    off = np.linalg.norm(walk(jnp.float32) - exact) / np.linalg.norm(exact - THETA)
    assert off < 1e-4


def test_the_count_saturates_and_the_step_goes_on():
    tx = adamite.scale_by_adam()
    state = tx.init(jnp.ones(2))._replace(count=jnp.int32(2**31 - 2))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jnp.ones(2), state)
    assert state.count == 2**31 - 1
    assert jnp.isfinite(updates).all()
