"""What the golden trajectories, which are real, do not show of StableAdamW: its clipping of complex gradients."""

import jax.numpy as jnp
import numpy as np

import adamite


def spike(turn, dtype):
    """The direction at a gradient a thousand times larger than the fifty before it."""
    tx = adamite.scale_by_stable_adam()
    state = tx.init(jnp.zeros(2, dtype))
    for size in 50 * [1.0] + [1000.0]:
        direction, state = tx.update(jnp.array([size, -size], dtype) * turn, state)
    return np.asarray(direction)


def test_complex_gradients_are_clipped_as_real_ones():
    expected = spike(1, jnp.float32)
    assert abs(expected[0]) < 0.2  # Adam's would be 0.63
    for turn in (1, 1j, np.complex64(np.exp(2j))):
        np.testing.assert_allclose(spike(turn, jnp.complex64), expected * turn, rtol=1e-5)
