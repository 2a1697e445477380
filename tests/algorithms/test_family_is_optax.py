"""Whatever optax has, over flags and hyperparameters: updates and state bit for bit, in float32 under jit.

LAMB's norms are sums, and in which order numbers are added depends on the processor and on what a compiler fuses: there
the moments have the same bits, and the updates are within some units in the last place.
"""

import inspect

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from bits import assert_same_bits, trajectory
from specs import SPECS, halved

pytestmark = pytest.mark.few(8)

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


@pytest.mark.parametrize(("spec", "kwargs"), halved(CASES))
def test_updates_and_state_are_optax_to_the_bit(spec, kwargs):
    ours, theirs = (trajectory(tx, PARAMS, GRADIENTS) for tx in (spec.build(**kwargs), spec.build_twin(**kwargs)))
    if spec.name == "lamb":
        (ours, ours_states), (theirs, theirs_states) = ((path, states) for _, (path, states) in (ours, theirs))
        assert_same_bits(ours_states, theirs_states)
        chex.assert_trees_all_close(ours, theirs, rtol=2e-6, atol=1e-9)
    else:
        assert_same_bits(ours, theirs)
