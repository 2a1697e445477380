"""What holds for every optimizer alike: refused values, schedules for any hyperparameter, wrappers around it."""

import functools
import inspect

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from bits import assert_same_bits
from compilation import compiled
from specs import SPECS

pytestmark = pytest.mark.few(2)

RECIPES = {spec.make.__name__: spec.make for spec in SPECS if spec.full and spec.make.__module__.startswith("adamite")}
REFUSED = {
    "learning_rate": -1.0,
    "b1": 1.0,
    "b2": -0.1,
    "b3": 1.5,
    "decay": 1.0,
    "momentum": 1.0,
    "alpha": -1.0,
    "a": -1.0,
    "b": -1.0,
    "eps": -1e-8,
    "eps_root": float("nan"),
    "initial_accumulator_value": -0.1,
    "initial_scale": -1.0,
    "threshold": float("inf"),
    "weight_decay": -0.1,
    "mu_dtype": "int8",
    "accumulator_dtype": "int8",
    "mask": "all",
    "partition": 3,
    "moments": "int7",
    "rounding": "up",
    "clip_value_fn": "a quarter",
    "axis_name": 3,
    **dict.fromkeys(
        [
            "nesterov",
            "bias_correction",
            "bias_correction_mu",
            "bias_correction_nu",
            "max_before_correction",
            "centered",
            "eps_in_sqrt",
            "use_clipping",
        ],
        "yes",
    ),
}
each = pytest.mark.parametrize("name", RECIPES)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}
GRADS = {"w": jnp.cos(PARAMS["w"] * 9), "b": jnp.array([0.5, -1.0, 2.0])}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, make in RECIPES.items() for argument in inspect.signature(make).parameters],
)
def test_every_argument_refuses_something_by_name(name, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must "):
        RECIPES[name](**{"learning_rate": 1e-3, argument: REFUSED[argument]})


def numeric(name):
    """The hyperparameters of a recipe that are numbers by default."""
    return {
        p.name: p.default
        for p in inspect.signature(RECIPES[name]).parameters.values()
        if isinstance(p.default, float) and p.default < 1e3
    }


@each
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_number_may_be_a_schedule(name, dtype):
    """Through inject_hyperparams, in float32, on bfloat16 parameters too: as if built anew at each step."""
    params, grads = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (PARAMS, GRADS))
    values = {"learning_rate": 0.1, **numeric(name)}
    schedules = {k: lambda count, v=v: v * (1 - 0.1 * count) for k, v in values.items()}
    functions = {"partition", "clip_value_fn"} & set(inspect.signature(RECIPES[name]).parameters)
    inject = optax.inject_hyperparams(RECIPES[name], static_args=functions, hyperparam_dtype=jnp.float32)
    tx = inject(**schedules)
    state = tx.init(params)
    by_hand = RECIPES[name](**{k: jnp.float32(f(0)) for k, f in schedules.items()}).init(params)
    update = jax.jit(tx.update)
    for count in range(3):
        updates, state = update(grads, state, params)
        now = RECIPES[name](**{k: jnp.float32(f(count)) for k, f in schedules.items()})
        expected, by_hand = jax.jit(now.update)(grads, by_hand, params)
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        chex.assert_trees_all_close(
            *(jax.tree.map(lambda x: x.astype(jnp.float32), u) for u in (updates, expected)), rtol=tolerance, atol=1e-7
        )
        assert all(jnp.isfinite(u.astype(jnp.float32)).all() for u in updates.values())


@each
def test_schedule_free_and_lookahead_go_around_it(name):
    def run(tx, params):
        state = tx.init(params)
        for _ in range(4):
            updates, state = jax.jit(tx.update)(GRADS, state, params)
            params = optax.apply_updates(params, updates)
        return params

    free = run(optax.contrib.schedule_free(RECIPES[name](0.1), 0.1), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(free, PARAMS)
    chex.assert_tree_all_finite(free)
    tx = optax.lookahead(RECIPES[name](0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    plain = PARAMS
    plain_state = RECIPES[name](0.1).init(plain)
    for _ in range(2):
        updates, plain_state = jax.jit(RECIPES[name](0.1).update)(GRADS, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    half_way = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, plain)
    chex.assert_trees_all_close(params.slow, half_way, rtol=1e-5, atol=1e-6)


DIRECTIONS = [s for s in SPECS if not s.full and not s.needs_params] + [
    s._replace(name=f"scale_by_{n}", make=getattr(adamite, f"scale_by_{n}"), twin=None, full=False)
    for n, s in (("laprop", SPECS[0]), ("adam_atan2", SPECS[0]), ("adam_mini", SPECS[0]), ("stable_adam", SPECS[0]))
]


@pytest.mark.parametrize("spec", DIRECTIONS, ids=lambda s: s.name)
def test_cautious_goes_around_every_direction(spec):
    tx = adamite.cautious(spec.build())
    plain, _ = spec.build().update(GRADS, spec.build().init(PARAMS), PARAMS)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_structs(state, spec.build().init(PARAMS))
    turned, _ = tx.update(jax.tree.map(lambda g: -1e-3 * g, GRADS), state, PARAMS)
    for key, u in updates.items():
        kept = np.asarray(plain[key] * GRADS[key] > 0)
        np.testing.assert_allclose(u, np.where(kept, plain[key], 0) * kept.size / (kept.sum() + 1), rtol=1e-5)
        assert (np.asarray(turned[key] * -GRADS[key]) >= 0).all()


def test_cautious_chains_into_an_optimizer():
    tx = adamite.chain(adamite.cautious(adamite.scale_by_adam()), adamite.scale_by_learning_rate(0.1))
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    plain, _ = adamite.adam(0.1).update(GRADS, adamite.adam(0.1).init(PARAMS))
    np.testing.assert_allclose(updates["w"], plain["w"] * 12 / 13, rtol=1e-5)
    with pytest.raises(TypeError, match="tx must be a gradient transformation, got 'adam' of type str"):
        adamite.cautious("adam")


@pytest.mark.more
def test_a_run_is_reproducible():
    for make in RECIPES.values():
        runs = [jax.jit(make(0.1).update)(GRADS, make(0.1).init(PARAMS), PARAMS) for _ in range(2)]
        assert_same_bits(*runs)


@each
def test_sharded_over_eight_devices(name):
    """State follows the parameters, one program serves all steps, and the numbers are those of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("data")))
    params = {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4), "b": jnp.ones(8)}
    tx = RECIPES[name](0.1)
    states = {"eager": tx.init(put(params)), "jit": jax.jit(tx.init)(put(params))}
    for state in states.values():
        for leaf in jax.tree.leaves(state):
            assert leaf.sharding.num_devices == 8
            whole = jax.tree.leaves(jax.tree.map(lambda p, x=leaf: p.shape == x.shape, params))
            assert leaf.sharding.is_fully_replicated != any(whole)

    def train(params, state):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
            return optax.apply_updates(params, updates), state

        before = compiled()
        for _ in range(3):
            params, state = step(params, state)
        assert compiled() - before == 1
        return params, state

    chex.assert_trees_all_close(train(put(params), states["jit"]), train(params, tx.init(params)), rtol=2e-6, atol=1e-7)


TWINS = [spec for spec in SPECS if spec.twin and spec.full]


@pytest.mark.parametrize("spec", TWINS, ids=str)
def test_checkpoints_go_to_optax_and_back(spec):
    """Two steps here, saved and restored there, two steps, saved and restored here, two more: as if never moved."""

    def walk(tx, state, steps=2):
        update = jax.jit(tx.update)
        for _ in range(steps):
            _, state = update(GRADS, state, PARAMS)
        return state

    ours, theirs = spec.build(), spec.build_twin()
    state = walk(ours, ours.init(PARAMS))
    for tx in (theirs, ours):
        state = walk(tx, flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state)))
    assert_same_bits(state, walk(theirs, theirs.init(PARAMS), 6))
