"""Whatever optax has, over flags and hyperparameters: updates and state bit for bit, in float32 under jit."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from bits import assert_same_bits, trajectory
from specs import SPECS

STEPS = 100
SHAPES = {"kernel": (17, 5), "bias": (5,), "scale": ()}
RNG = np.random.default_rng(2)
PARAMS = {k: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for k, shape in SHAPES.items()}
GRADIENTS = {
    k: jnp.asarray(RNG.standard_normal((STEPS, *shape)) * 10.0 ** RNG.uniform(-6, 3, (STEPS, *shape)), jnp.float32)
    for k, shape in SHAPES.items()
}
CASES = [
    pytest.param(spec, flags | values, id=f"{spec}-{flags}-{which}")
    for spec in SPECS
    if spec.twin
    for flags in spec.flags
    if set(flags) <= set(inspect.signature(spec.twin).parameters)  # not ours alone
    for which, values in (("defaults", {}), ("other values", spec.combinations()[-1]))
]


@pytest.mark.parametrize(("spec", "kwargs"), CASES)
def test_updates_and_state_are_optax_to_the_bit(spec, kwargs):
    assert_same_bits(
        trajectory(spec.build(**kwargs), PARAMS, GRADIENTS), trajectory(spec.build_twin(**kwargs), PARAMS, GRADIENTS)
    )
