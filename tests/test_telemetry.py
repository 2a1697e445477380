"""Telemetry tells the truth, changes nothing, and reads whatever optimizer is inside."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite import TelemetryState, accumulate, skip_nonfinite, telemetry, with_telemetry
from adamite.sharding import zero1
from bits import assert_same_bits, types
from compilation import compiled

pytestmark = pytest.mark.few(1)

SHAPES = {"w": (16, 256), "b": (5,), "s": ()}


def values(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def run(tx, params, steps=3):
    """Parameters before the last step, its updates, the state after it."""
    state, update, before = tx.init(params), jax.jit(tx.update), params
    for seed in range(1, steps + 1):
        before = params
        updates, state = update(values(seed, params["w"].dtype), state, params)
        params = optax.apply_updates(params, updates)
    return before, updates, state


def norm(tree):
    return math.sqrt(sum(float(np.sum(np.abs(np.asarray(x, np.float64)) ** 2)) for x in jax.tree.leaves(tree)))


STORAGES = {
    "float32": (jnp.float32, {}),
    "int8, residual8": (jnp.bfloat16, {"moments": "int8", "rounding": "residual8"}),
    "int8, float8": (jnp.float32, {"moments": ("int8", "float8")}),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_against_float64(storage):
    dtype, choice = STORAGES[storage]
    schedule = optax.linear_schedule(1e-2, 1e-3, 4)
    before, updates, state = run(with_telemetry(adamite.adamw(schedule, eps=0.5, **choice)), values(0, dtype))
    told = telemetry(state)
    adam = adamite.convert_moments(state.inner, "float32")[0]
    g = values(3, dtype)
    for name, tree in {"gradient": g, "update": updates, "parameter": before, "mu": adam.mu}.items():
        for path, leaf in [("", tree), *((f"/{k}", v) for k, v in tree.items())]:
            assert told[f"{name}_norm{path}"] == pytest.approx(norm(leaf), rel=1e-5)
    assert told["sqrt_nu_norm"] == pytest.approx(norm(jax.tree.map(jnp.sqrt, adam.nu)), rel=1e-5)
    assert told["update_ratio/w"] == pytest.approx(norm(updates["w"]) / norm(before["w"]), rel=1e-5)
    small = {k: np.sqrt(np.asarray(v, np.float64) / (1 - 0.999**3)) < 0.5 for k, v in adam.nu.items()}
    assert told["epsilon_share/w"] == pytest.approx(small["w"].mean(), abs=1e-3)
    assert told["epsilon_share"] == pytest.approx(np.mean(np.concatenate([*map(np.ravel, small.values())])), abs=1e-3)
    assert 0.05 < told["epsilon_share"] < 0.95
    assert told["learning_rate"] == pytest.approx(float(schedule(2)))


@pytest.mark.parametrize(
    "tx",
    [
        adamite.adamw(1e-2),
        adamite.lamb(1e-2),
        adamite.adamw(1e-2, moments="int8"),
        optax.adam(1e-2),
        adamite.chain(optax.clip_by_global_norm(1.0), adamite.adam(1e-2)),
        optax.masked(adamite.adam(1e-2), {"w": True, "b": False, "s": True}),
        skip_nonfinite(adamite.adam(1e-2)),
        optax.inject_hyperparams(adamite.adam)(1e-2),
        accumulate(adamite.adam(1e-2), 2),
    ],
    ids=["adamw", "lamb", "int8", "optax", "chain", "masked", "guarded", "injected", "accumulated"],
)
def test_nothing_changes(tx):
    watched = run(with_telemetry(tx), values(0))
    plain = run(tx, values(0))
    assert_same_bits((watched[0], watched[1], watched[2].inner), plain)
    told = telemetry(watched[2])
    assert all("/" in name or math.isfinite(x) for name, x in told.items())
    assert told["mu_norm/w"] > 0


@pytest.mark.parametrize(
    ("tx", "quantities"),
    [
        (adamite.sgd(0.1), set()),
        (adamite.sgd(0.1, momentum=0.9), {"trace_norm"}),
        (adamite.adagrad(0.1), {"sqrt_sum_of_squares_norm"}),
        (adamite.rmsprop(0.1), {"sqrt_nu_norm", "epsilon_share"}),
        (adamite.amsgrad(0.1), {"mu_norm", "sqrt_nu_norm", "sqrt_nu_max_norm", "epsilon_share"}),
        (adamite.lion(0.1), {"mu_norm"}),
        (adamite.ademamix(0.1), {"m1_norm", "m2_norm", "sqrt_nu_norm", "epsilon_share"}),
        (optax.adam(0.1), {"mu_norm", "sqrt_nu_norm"}),
    ],
    ids=["sgd", "momentum", "adagrad", "rmsprop", "amsgrad", "lion", "ademamix", "optax"],
)
def test_what_there_is_to_tell(tx, quantities):
    told = telemetry(run(with_telemetry(tx), values(0))[2])
    always = {"gradient_norm", "update_norm", "parameter_norm", "update_ratio"}
    ours = {"learning_rate"} if adamite.identity(tx) else set()
    assert {name for name in told if "/" not in name} == always | ours | quantities
    assert all(type(x) in (float, int, bool) for x in told.values())


def test_groups():
    tx = with_telemetry(adamite.adam(0.1), group=lambda path: "matrix" if path[-1].key == "w" else "rest")
    _, _, state = run(tx, values(0))
    told, g = telemetry(state), values(3)
    assert {name for name in told if name.startswith("gradient_norm")} == {
        "gradient_norm", "gradient_norm/matrix", "gradient_norm/rest",
    }  # fmt: skip
    assert told["gradient_norm/rest"] == pytest.approx(norm((g["b"], g["s"])), rel=1e-5)


def test_what_is_not_there_is_not_a_number():
    tx = with_telemetry(adamite.adam(0.1))
    _, state = tx.update(values(1) | {"b": None}, tx.init(values(0)))
    told = telemetry(state)
    assert math.isnan(told["parameter_norm"])
    assert math.isnan(told["gradient_norm/b"])
    assert told["gradient_norm"] > 0


def test_a_nan_is_told():
    tx = with_telemetry(skip_nonfinite(adamite.adam(0.1)))
    params = values(0)
    bad = values(1) | {"b": jnp.full(5, jnp.nan)}
    _, state = jax.jit(tx.update)(bad, tx.init(params), params)
    told = telemetry(state)
    assert math.isnan(told["gradient_norm"])
    assert math.isnan(told["gradient_norm/b"])
    assert (told["skipped"], told["update_norm"], told["mu_norm"]) == (1, 0.0, 0.0)


def test_counts_and_injected_numbers_without_telemetry():
    tx = accumulate(skip_nonfinite(optax.inject_hyperparams(adamite.adam)(optax.linear_schedule(1.0, 0.0, 4))), 1)
    _, _, state = run(tx, values(0))
    told = telemetry(state)
    assert (told["dropped"], told["skipped"], told["gave_up"], told["learning_rate"]) == (0, 0, False, 0.5)


@pytest.mark.more
def test_one_program_scanned_and_donated():
    tx, params = with_telemetry(adamite.adamw(optax.linear_schedule(1e-2, 1e-3, 10), moments="int8")), values(0)
    step = jax.jit(lambda g, state, params: tx.update(g, state, params), donate_argnums=1)
    state, gradients = tx.init(params), [values(seed) for seed in range(3)]
    expected, before = types(state), compiled()
    for g in gradients:
        _, state = step(g, state, params)
        assert types(state) == expected
    assert compiled() - before == 1
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    state, norms = jax.lax.scan(
        lambda s, g: (lambda u, s: (s, s.record["update_norm"][""]))(*tx.update(g, s, params)), tx.init(params), stacked
    )
    assert norms.shape == (3,)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_as_on_one(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx, params, g = with_telemetry(adamite.adamw(1e-2, moments="int8")), values(0), values(1)
    there = jax.device_put(params, NamedSharding(mesh, P()))
    spread = zero1(tx, mesh)
    _, state = jax.jit(spread.update)(jax.device_put(g, NamedSharding(mesh, P())), spread.init(there), there)
    _, expected = jax.jit(tx.update)(g, tx.init(params), params)
    assert telemetry(state) == pytest.approx(telemetry(expected), rel=1e-5, nan_ok=True)


def test_parts_in_shard_map():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    tx = with_telemetry(adamite.sgd(0.1), axis_name="i")
    params = {"cut": jnp.arange(16.0).reshape(8, 2), "whole": jnp.ones(3)}
    specs = {"cut": P("i"), "whole": P()}
    state = tx.init(params)
    like = jax.tree.map(lambda x: P(), state)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=(specs, like, specs), out_specs=(specs, like))
    _, told = jax.jit(update)(params, state, params)
    assert telemetry(told)["gradient_norm"] == pytest.approx(norm(params), rel=1e-6)


def test_eager_is_jitted():
    tx, params = with_telemetry(adamite.adamw(1e-2)), values(0)
    state = tx.init(params)
    for seed in (1, 2, 3):
        updates, state = tx.update(values(seed), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(state, run(tx, values(0))[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: with_telemetry(None), TypeError, "tx must be a gradient transformation, got None"),
        (lambda: with_telemetry(optax.identity(), group="w"), TypeError, "group must be a function, got 'w'"),
        (lambda: with_telemetry(optax.identity(), axis_name=2), TypeError, "axis_name must be None, a string or"),
        (lambda: telemetry(()), ValueError, "state must hold something to tell, such as a TelemetryState, got tuple"),
        (lambda: telemetry(optax.adam(1.0).init(jnp.ones(2))), ValueError, "state must hold something to tell"),
        (
            lambda: with_telemetry(optax.identity()).update(jnp.ones(2), optax.EmptyState()),
            TypeError,
            "state must be a TelemetryState, got EmptyState",
        ),
    ],
)
def test_mistakes(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_its_state_has_a_name():
    assert isinstance(with_telemetry(adamite.adam(0.1)).init(values(0)), TelemetryState)
