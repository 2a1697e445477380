"""Wrappers of Optax that move weights themselves or scale updates, inside of a chain that rounds weights of 16 bits.

The rounding comes last, around them: they see the full weights, and the run is that of float32 weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import adamite

START = np.random.default_rng(0).uniform(0.5, 2.0, (16, 300)).astype(np.float32)
GOAL = 1.0
STEPS = 40
RATE = 3e-3


def inner():
    return adamite.adamw(RATE, weight_decay=0.1, moments="int8")


WRAPPERS = {
    "lookahead": lambda: optax.lookahead(inner(), sync_period=5, slow_step_size=0.5),
    "schedule_free": lambda: contrib.schedule_free(adamite.adamw(10 * RATE, b1=0.0), 10 * RATE),
    "mechanize": lambda: contrib.mechanize(inner()),
    "reduce_on_plateau": lambda: optax.chain(inner(), contrib.reduce_on_plateau(0.5, patience=5)),
    "sam": lambda: contrib.sam(inner(), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2),
    "scale": lambda: optax.chain(inner(), optax.scale(0.5)),
    "keep_params_nonnegative": lambda: optax.chain(inner(), optax.keep_params_nonnegative()),
    "backtracking": lambda: optax.chain(
        inner(), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5, store_grad=True)
    ),
    "ema of updates": lambda: optax.chain(inner(), optax.ema(0.9)),
    "trust ratio": lambda: optax.chain(inner(), optax.scale_by_trust_ratio(trust_coefficient=0.01)),
    "apply_every": lambda: optax.chain(inner(), optax.apply_every(3)),
    "MultiSteps": lambda: optax.MultiSteps(inner(), 3).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
    "masked": lambda: optax.masked(inner(), True),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adamite.adamw, ("moments",), jnp.float32)(
        RATE, weight_decay=0.1, moments="int8"
    ),
}
TOLD = {"reduce_on_plateau", "backtracking"}
"""Those that need the loss as extra argument."""

each = pytest.mark.parametrize("name", WRAPPERS)
pytestmark = pytest.mark.few(8)


def loss_of(params):
    return jnp.mean((params.astype(jnp.float32) - GOAL) ** 2)


def trained(name, tx, dtype, by_step=False):
    """The full weights after some steps."""
    lookahead = name == "lookahead"
    params = jnp.asarray(START).astype(jnp.bfloat16).astype(dtype)
    params = optax.LookaheadParams.init_synced(params) if lookahead else params

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss_of)(params.fast if lookahead else params)
        told = {"value": value, "grad": g.astype(jnp.float32), "value_fn": loss_of} if name in TOLD else {}
        if by_step:
            return tx.step(g, state, params, **told)
        updates, state = tx.update(g, state, params, **told)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    full = adamite.full_weights(params, state)
    return full.slow if lookahead else full


@each
@pytest.mark.parametrize("rounding", ["stochastic", "residual8", "residual16"])
@pytest.mark.parametrize("by_step", [False, True], ids=["update", "step"])
def test_the_rounding_around_it_trains_as_float32_does(name, rounding, by_step):
    goal = trained(name, WRAPPERS[name](), jnp.float32)
    ours = trained(name, adamite.chain(WRAPPERS[name](), rounding=rounding), jnp.bfloat16, by_step)
    way, off = goal - START, ours - goal
    assert abs(float(jnp.mean(off))) < 0.02 * float(jnp.mean(jnp.abs(way)))
    if rounding != "stochastic":  # whose weights differ one by one, and agree in the mean
        assert float(jnp.linalg.norm(off)) < 0.05 * float(jnp.linalg.norm(way))


def test_the_state_of_a_wrapper_is_of_the_full_weights():
    """The average of `schedule_free` and the anchor of `mechanize` are float32."""
    params = jnp.asarray(START, jnp.bfloat16)
    free, _ = adamite.chain(WRAPPERS["schedule_free"](), rounding="residual8").init(params)
    anchored, _ = adamite.chain(WRAPPERS["mechanize"](), rounding="residual8").init(params)
    assert free.z.dtype == anchored.x0.dtype == jnp.float32
    free, _ = jax.eval_shape(adamite.chain(WRAPPERS["schedule_free"](), rounding="residual8").init, params)
    assert free.z.dtype == jnp.float32


@pytest.mark.parametrize(
    "tx",
    [
        adamite.adamw(RATE, rounding="stochastic"),
        adamite.skip_nonfinite(adamite.adamw(RATE, rounding="residual8")),
        adamite.chain(optax.clip(1.0), adamite.adamw(RATE, rounding="nearest")),
        adamite.accumulate(adamite.chain(adamite.lion(RATE), adamite.round_weights()), 2),
    ],
    ids=["recipe", "guard", "chain", "accumulate"],
)
def test_what_comes_behind_a_rounding_is_refused(tx):
    with pytest.raises(ValueError, match=r"^parts\[0\] rounds weights, and parts\[1\] would move them again"):
        adamite.chain(tx, contrib.reduce_on_plateau())
    with pytest.raises(ValueError, match=r"^tx rounds weights"):
        adamite.cautious(tx)
