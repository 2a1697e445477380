"""Eager loops: nothing is compiled once a loop has begun, and a step has the numbers of a jitted one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite import engines
from adamite.engines.native.library import library
from compilation import compiled
from specs import SPECS

pytestmark = pytest.mark.few(8)

WRAPPED = {
    "chain with optax's parts": lambda: adamite.chain(optax.clip_by_global_norm(1.0), adamite.adamw(1e-2)),
    "int8, residual8": lambda: adamite.adamw(1e-2, moments="int8", rounding="residual8"),
    "bfloat16, stochastic": lambda: adamite.adamw(1e-2, moments="bfloat16", rounding="stochastic"),
    "a schedule": lambda: adamite.adam(optax.linear_schedule(1e-2, 0.0, 100)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adamite.adamw)(1e-2),
    "inject_hyperparams, chained": lambda: optax.chain(
        optax.inject_hyperparams(adamite.scale_by_adam)(b1=0.8), optax.scale_by_learning_rate(1e-2)
    ),
    "masked": lambda: optax.masked(adamite.adam(1e-2), {"w": True, "b": False}),
    "skip_nonfinite": lambda: adamite.skip_nonfinite(adamite.adam(1e-2)),
    "with_telemetry": lambda: adamite.with_telemetry(adamite.adam(1e-2)),
    "with_ema": lambda: adamite.with_ema(adamite.adam(1e-2)),
    "with_ema, bfloat16": lambda: adamite.with_ema(optax.adam(1e-2), storage="bfloat16"),
    "accumulate": lambda: adamite.accumulate(adamite.adam(1e-2), 2),
}
CASES = {spec.name: spec.build for spec in SPECS} | WRAPPED


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.standard_normal((17, 256)), dtype), "b": jnp.asarray(rng.standard_normal(5), dtype)}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_after_the_second_step(case):
    tx = CASES[case]()
    dtype = jnp.bfloat16 if "residual" in case or "stochastic" in case else jnp.float32
    params, g = tree(0, dtype), tree(1, dtype)
    state, before = tx.init(params), 0
    for step in range(1, 13):
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        if step == (4 if case == "accumulate" else 2):  # its second due step
            before = compiled()
    assert compiled() == before


TAKEN = {"xla": set(), "native": {"native" if library() else "xla"}, "pallas": {"pallas"}}


@pytest.mark.parametrize("engine", TAKEN)
def test_whole_steps_are_compiled_once(engine):
    tx, params, g = adamite.adamw(1e-2, moments="int8"), tree(0), tree(1)
    state, before = tx.init(params), 0
    with engines.recorded() as choices:
        for step in range(1, 7):
            params, state = tx.step(g, state, params, engine=engine)
            if step == 2:
                before = compiled()
        assert compiled() == before
    assert {choice.engine for choice in choices} == TAKEN[engine]


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_eager_steps_are_jitted_steps(moments):
    tx, jitted = adamite.adamw(1e-2, moments=moments), jax.jit(adamite.adamw(1e-2, moments=moments).update)
    params = tree(0)
    ours, theirs = tx.init(params), tx.init(params)
    for seed in range(1, 6):
        updates, ours = tx.update(tree(seed), ours, params)
        expected, theirs = jitted(tree(seed), theirs, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), updates, expected)


@pytest.mark.parametrize("engine", TAKEN)
def test_a_schedule_of_python_numbers_does_not_compile_at_every_step(engine):
    tx, params, before = adamite.adam(lambda count: 0.1 * 0.9 ** int(count)), jnp.ones(300), 0
    state = tx.init(params)
    for step in range(1, 11):
        params, state = tx.step(jnp.ones(300), state, params, engine=engine)
        before = compiled() if step == 6 else before
    assert engine == "pallas" or compiled() == before  # which is interpreted here, for tests alone
    np.testing.assert_allclose(params, 1 - sum(0.1 * 0.9**t for t in range(10)), rtol=1e-3)


def test_a_schedule_may_branch_on_a_known_count():
    """In eager code a count is known, and Optax calls schedules with it."""
    tx, params = adamite.adam(lambda count: 0.1 if count < 1 else 0.2), jnp.zeros(3)
    state, sizes = tx.init(params), []
    for _ in range(2):
        updates, state = tx.update(jnp.ones(3), state, params)
        sizes.append(float(updates[0]))
    np.testing.assert_allclose(sizes, [-0.1, -0.2], rtol=1e-4)


def test_a_hyperparameter_that_changes_is_not_compiled_in():
    """`inject_hyperparams` makes each step's transformation from the values of that step."""
    tx, params = optax.inject_hyperparams(adamite.adam)(0.1), jnp.zeros(3)
    state = tx.init(params)
    for rate in (0.1, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = tx.update(jnp.ones(3), state, params)
        np.testing.assert_allclose(updates, -rate, rtol=1e-4)
