"""Long runs with lean state: they go where float64 goes, as far, and in no jumps. `pytest -s` prints how close."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
import reference.adam
from adamite.rounding import Residual8
from adamite.storage import Blockwise

pytestmark = pytest.mark.more

SHAPE = (4, 256)
RNG = np.random.default_rng(0)
START = np.asarray(jnp.asarray(RNG.standard_normal(SHAPE), jnp.bfloat16), np.float64)
MEANS = RNG.standard_normal(SHAPE)


@functools.cache
def gradients(steps, noise):
    """Noise around a steady mean, of the weights' own dtype."""
    rng = np.random.default_rng(1)
    g = MEANS * (1 + noise * rng.standard_normal((steps, *SHAPE)))
    return np.asarray(jnp.asarray(g, jnp.bfloat16), np.float64)


@functools.cache
def exact(steps, noise=0.5):
    """Where float64 is at the end."""
    return reference.adam.adam(START, gradients(steps, noise), RATE)[-1]


def end(tx, steps, noise=0.5):
    """Where bfloat16 weights are at the end, with their residuals."""
    params = jnp.asarray(START, jnp.bfloat16)

    @jax.jit
    def run(params, state, gradients):
        def step(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    params, state = run(params, tx.init(params), jnp.asarray(gradients(steps, noise), jnp.bfloat16))
    return np.asarray(adamite.full_weights(params, state), np.float64)


def travelled(found, goal):
    """Of the way from the start to the goal, which part."""
    way = goal - START
    return np.sum((found - START) * way) / np.sum(way**2)


def missed_by(found, goal):
    """The distance from the goal, as a part of the way there."""
    return np.linalg.norm(found - goal) / np.linalg.norm(goal - START)


STEPS, RATE = 5000, 1e-4
INT8 = Blockwise(smallest=1)
MOMENTS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": INT8,
    "float8": (INT8, Blockwise(smallest=1, float8=True)),
}


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("rounding", ["stochastic", "residual8", "residual16"])
def test_weights_of_16_bits_go_as_far_as_float64(rounding, moments):
    goal = exact(STEPS)
    found = end(adamite.adam(RATE, moments=MOMENTS[moments], rounding=rounding), STEPS)
    print(f"\n{rounding}, {moments}: travelled {travelled(found, goal):.4f}, missed by {missed_by(found, goal):.4f}")
    assert abs(travelled(found, goal) - 1) < 0.02
    if rounding != "stochastic" and moments in ("float32", "bfloat16"):  # each weight by itself, too
        assert missed_by(found, goal) < 0.02


def test_optax_and_the_nearest_do_not():
    """Steps of 1e-4 are lost wherever a weight is larger than 0.05, and optax's nu is too large besides."""
    goal = exact(STEPS)
    for tx in (optax.adam(RATE), adamite.adam(RATE, rounding="nearest")):
        assert travelled(end(tx, STEPS), goal) < 0.5


@pytest.mark.parametrize(("noise", "times"), [(0.1, 5), (0.5, 2), (2.0, 2)])
def test_a_residual_rounded_to_the_nearest_is_further_off(noise, times):
    """The steadier the updates, the further: there an update of 3.3 counts is always cut to 3."""

    class ToNearest(Residual8):
        def round(self, theta, dtype, bits):
            del bits
            return super().round(theta, dtype, lambda: jnp.full(theta.shape, 2**31, jnp.uint32))

    goal = exact(3000, noise)
    ours, nearest = (
        missed_by(end(adamite.adam(RATE, rounding=how), 3000, noise), goal) for how in (Residual8(), ToNearest())
    )
    print(f"\nnoise {noise}: stochastic is off by {ours:.5f} of the way, to the nearest by {nearest:.5f}")
    assert ours < nearest / times


@pytest.mark.parametrize(
    "moments", [pytest.param(m, marks=[] if m == "int8" else [pytest.mark.slow]) for m in [*MOMENTS][1:]]
)
def test_no_storage_doubles_the_largest_update_in_heavy_tailed_blocks(moments):
    """Scales in a block are spread log-normally, with half a decade as the standard deviation."""
    rng = np.random.default_rng(2)
    scale = 10 ** (0.5 * rng.standard_normal((64, 256)))
    table = jnp.asarray(scale * (rng.standard_normal((997, 64, 256)) + 0.1), jnp.float32)

    def largest(moments):
        tx = adamite.scale_by_adam(moments=moments)

        @jax.jit
        def run(state):
            def step(state, t):
                updates, state = tx.update(table[t % len(table)], state)
                return state, jnp.abs(updates).max()

            return jax.lax.scan(step, state, jnp.arange(2000))[1].max()

        return float(run(tx.init(table[0])))

    ours, float32 = largest(MOMENTS[moments]), largest("float32")
    print(f"\n{moments}: {ours:.2f}, float32: {float32:.2f}")
    assert ours < 2 * float32
