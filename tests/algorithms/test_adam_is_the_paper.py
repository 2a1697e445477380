"""What the golden trajectories do not cover of Adam: complex numbers, no bias correction, the public parts, BERT's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamite

STEPS, SIZE = 1000, 64
RNG = np.random.default_rng(0)
THETA = RNG.standard_normal(SIZE).astype(np.float32).astype(np.float64)  # exact in float32, too
# Gradients whose size differs by element over eight decades and drifts in time, as a network's do.
SIZES = 10.0 ** RNG.uniform(-6, 2, SIZE) * (1 + 0.9 * np.sin(np.arange(STEPS) / 50))[:, None]
GRADIENTS = SIZES * (RNG.standard_normal((STEPS, SIZE)) + 0.3)

RATE = 1e-2


def build(weight_decay=0.0, **kwargs):
    return adamite.chain(
        adamite.scale_by_adam(**kwargs),
        adamite.add_decayed_weights(weight_decay),
        adamite.scale_by_learning_rate(RATE),
    )


def run(tx, theta, gradients):
    @jax.jit
    def scan(theta, gradients):
        def step(carry, g):
            theta, state = carry
            updates, state = tx.update(g, state, theta)
            theta = optax.apply_updates(theta, updates)
            return (theta, state), theta

        (_, state), path = jax.lax.scan(step, (theta, tx.init(theta)), gradients)
        return path, state[0]

    return scan(theta, gradients)


def displacement_error(path, expected):
    """Distance from the exact path over the distance moved, both Euclidean, the worst of all steps."""
    off = np.linalg.norm(np.asarray(path, np.float64) - expected, axis=1)
    return (off / np.linalg.norm(expected - THETA, axis=1)).max()


def test_complex_is_the_paper_with_the_modulus():
    rng = np.random.default_rng(1)
    theta = rng.standard_normal(8) + 1j * rng.standard_normal(8)
    gradients = rng.standard_normal((50, 8)) + 1j * rng.standard_normal((50, 8))
    v, m, x = np.zeros(8), np.zeros(8, complex), theta
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g.real**2 + g.imag**2)
        x = x - RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    with jax.enable_x64(True):
        path, state = run(build(), jnp.asarray(theta), jnp.asarray(gradients))
        np.testing.assert_allclose(path[-1], x, rtol=1e-12)
        assert state.nu.dtype == jnp.float64
        np.testing.assert_allclose(state.nu, v, rtol=1e-12)


def test_the_parts_make_adam_in_five_lines():
    """The lines of docs/adam.md."""
    mu = nu = jnp.zeros(SIZE)
    theta = jnp.asarray(THETA, jnp.float32)
    for count, g in enumerate(jnp.asarray(GRADIENTS[:20], jnp.float32), start=1):
        mu = adamite.update_moment(g, mu, decay=0.9, order=1)
        nu = adamite.update_moment(g, nu, decay=0.999, order=2)
        m_hat = adamite.bias_correction(mu, decay=0.9, count=jnp.int32(count))
        v_hat = adamite.bias_correction(nu, decay=0.999, count=jnp.int32(count))
        theta = theta - RATE * m_hat / (jnp.sqrt(v_hat) + 1e-8)
    path, state = run(build(), jnp.asarray(THETA, jnp.float32), jnp.asarray(GRADIENTS[:20], jnp.float32))
    np.testing.assert_allclose(theta, path[-1], atol=1e-6)
    np.testing.assert_allclose(nu, state.nu, rtol=1e-5)
