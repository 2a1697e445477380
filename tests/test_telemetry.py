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
    ours = {"learning_rate"} if "learning_rate" in adamite.identity(tx) else set()
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
    chex.assert_tree_all_finite(state)
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


class TestEvery:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("jit", [True, False])
    def test_every_third_is_measured_as_if_each_were(self, storage, jit):
        dtype, choice = STORAGES[storage]
        inner = adamite.adamw(optax.linear_schedule(1e-2, 1e-3, 9), **choice)
        each, third = with_telemetry(inner), with_telemetry(inner, every=3)
        params = values(0, dtype)
        states, told = [tx.init(params) for tx in (each, third)], []
        updates = [jax.jit(tx.update) if jit else tx.update for tx in (each, third)]
        for seed in range(1, 8):
            g = values(seed, dtype)
            results = [update(g, state, params) for update, state in zip(updates, states, strict=True)]
            states = [state for _, state in results]
            assert_same_bits((results[0][0], states[0].inner), (results[1][0], states[1].inner))
            params = optax.apply_updates(params, results[0][0])
            told.append([telemetry(state) for state in states])
        for n, (_, now) in enumerate(told, 1):
            last = n - n % 3
            expected = told[last - 1][0] if last else dict.fromkeys(now, 0.0)
            for name, x in expected.items():
                zero = not last and name.startswith("update_ratio")
                assert now[name] == pytest.approx(math.nan if zero else x, rel=1e-5, nan_ok=True)
        assert states[1].record.count == 1

    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("moments", ["float32", "int8"])
    @pytest.mark.parametrize("inner", ["adamw", "lion", "accumulated"])
    def test_a_step_is_the_inner_step_to_the_bit(self, inner, moments, every):
        inner = {
            "adamw": lambda: adamite.adamw(1e-2, moments=moments),
            "lion": lambda: adamite.lion(1e-2, moments=moments),
            "accumulated": lambda: accumulate(skip_nonfinite(adamite.adamw(1e-2, moments=moments)), 2),
        }[inner]()
        tx = with_telemetry(inner, every=every)
        ours, theirs = (values(0), tx.init(values(0))), (values(0), inner.init(values(0)))
        step, plain = jax.jit(tx.step), jax.jit(inner.step)
        for seed in (1, 2, 3, 4):
            g, before = values(seed), ours[0]
            ours, theirs = step(g, ours[1], ours[0]), plain(g, theirs[1], theirs[0])
            assert_same_bits((ours[0], ours[1].inner), theirs)
        told = telemetry(ours[1])
        assert told["parameter_norm"] == pytest.approx(norm(before), rel=1e-5)
        assert told["gradient_norm/w"] == pytest.approx(norm(values(4)["w"]), rel=1e-5)

    def test_scanned_vmapped_and_on_devices(self):
        tx = with_telemetry(skip_nonfinite(adamite.adam(1e-2), axis_name="i"), every=2, axis_name="i")
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        params = {"cut": jnp.arange(16.0).reshape(8, 2), "whole": jnp.ones(3)}
        specs, state = {"cut": P("i"), "whole": P()}, tx.init(params)
        moments = state.inner.inner[0]._replace(count=P(), mu=specs, nu=specs)
        like = jax.tree.map(lambda _: P(), state)
        like = like._replace(inner=like.inner._replace(inner=(moments, *like.inner.inner[1:])))
        update = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=(specs, like, specs), out_specs=(specs, like)))
        for n in range(4):
            _, state = update(jax.tree.map(lambda x, n=n: (n + 1) * x, params), state, params)
        assert telemetry(state)["gradient_norm"] == pytest.approx(4 * norm(params), rel=1e-6)
        one = with_telemetry(adamite.adam(1e-2), every=2)
        stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x, 4 * x, 5 * x]), params)
        state, _ = jax.lax.scan(lambda s, g: (one.update(g, s, params)[1], None), one.init(params), stacked)
        assert telemetry(state)["gradient_norm"] == pytest.approx(4 * norm(params), rel=1e-6)
        assert state.record.count == 1

    def test_states_of_another_every(self):
        tx, params = with_telemetry(adamite.adam(0.1), every=2), values(0)
        with pytest.raises(TypeError, match="state must be one of with_telemetry with every=2, with a count"):
            tx.update(params, with_telemetry(adamite.adam(0.1)).init(params), params)
        with pytest.raises(TypeError, match="state must be one of with_telemetry with every=1, without a count"):
            with_telemetry(adamite.adam(0.1)).step(params, tx.init(params), params)


def schedule(count):
    return 1.0 / (1 + count)


class TestLearningRates:
    @pytest.mark.parametrize(
        ("tx", "expected"),
        [
            (adamite.adamw(schedule), {"learning_rate": 0.5}),
            (optax.chain(optax.clip(1.0), adamite.adamw(schedule)), {"learning_rate": 0.5}),
            (optax.chain(optax.scale_by_adam(), adamite.scale_by_learning_rate(0.25)), {"learning_rate": 0.25}),
            (optax.inject_hyperparams(adamite.adamw)(schedule), {"learning_rate": 0.5}),
            (optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(schedule)), {"learning_rate": 0.5}),
            (optax.apply_if_finite(optax.MultiSteps(adamite.adamw(schedule), 1), 3), {"learning_rate": 0.5}),
            (skip_nonfinite(optax.masked(adamite.sgd(schedule), {"w": True, "b": True, "s": False})), {
                "learning_rate": 0.5}),
            (optax.partition({"x": adamite.adamw(schedule), "y": adamite.sgd(0.25)}, {"w": "x", "b": "y", "s": "x"}), {
                "learning_rate/x": 0.5, "learning_rate/y": 0.25}),
            (optax.partition({"x": adamite.adamw(schedule), "y": optax.sgd(0.25)}, {"w": "x", "b": "y", "s": "x"}), {
                "learning_rate/x": 0.5}),
            (optax.partition(
                {"x": optax.inject_hyperparams(adamite.sgd)(schedule), "y": optax.inject_hyperparams(optax.sgd)(0.25)},
                {"w": "x", "b": "y", "s": "x"}), {"learning_rate/x": 0.5, "learning_rate/y": 0.25}),
            (optax.chain(adamite.adam(0.5), adamite.scale_by_learning_rate(0.1)), {}),
            (optax.adam(0.1), {}),
        ],
        ids=["adamite", "chain", "behind optax", "injected", "injected in a chain", "wrapped twice", "masked",
             "partition", "optax beside", "partition of injected", "two in a row", "optax"],
    )  # fmt: skip
    @pytest.mark.parametrize("every", [1, 2])
    def test_of_the_step_that_was_measured(self, tx, expected, every):
        told = telemetry(run(with_telemetry(tx, every=every), values(0), steps=2)[2])
        assert {name: x for name, x in told.items() if name.startswith("learning_rate")} == pytest.approx(expected)

    def test_injected_ones_that_change_are_told_as_they_are(self):
        tx = with_telemetry(optax.inject_hyperparams(adamite.adam)(0.1))
        state = tx.init(values(0))
        state.inner.hyperparams["learning_rate"] = jnp.float32(0.7)
        _, state = jax.jit(tx.update)(values(1), state, values(0))
        assert telemetry(state)["learning_rate"] == pytest.approx(0.7)
        assert "learning_rate" not in state.record

    def test_a_state_from_elsewhere_needs_no_init_here(self):
        state = with_telemetry(adamite.adam(schedule)).init(values(0))
        _, state = jax.jit(with_telemetry(adamite.adam(schedule)).update)(values(1), state, values(0))
        assert telemetry(state)["learning_rate"] == 1.0

    def test_guards_in_partitions_count_for_themselves(self):
        tx = optax.partition({k: skip_nonfinite(adamite.adam(0.1)) for k in "xy"}, {"w": "x", "b": "y", "s": "x"})
        _, state = tx.update(values(1) | {"b": jnp.full(5, jnp.nan)}, tx.init(values(0)), values(0))
        told = telemetry(state)
        assert (told["skipped/x"], told["skipped/y"], told["gave_up/x"]) == (0, 1, False)


@pytest.mark.parametrize("every", [1, 2])
def test_leading_axes_give_arrays(every):
    tx = with_telemetry(skip_nonfinite(optax.inject_hyperparams(adamite.adam)(schedule)), every=every)
    params = jax.tree.map(lambda *x: jnp.stack(x), values(0), values(1), values(2))
    state = jax.vmap(tx.init)(params)
    for _ in range(2):
        _, state = jax.jit(jax.vmap(tx.update))(params, state, params)
    told = telemetry(state)
    np.testing.assert_allclose(told["gradient_norm"], [norm(values(n)) for n in range(3)], rtol=1e-6)
    np.testing.assert_allclose(told["update_ratio/w"], told["update_norm/w"] / told["parameter_norm/w"])
    np.testing.assert_array_equal(told["learning_rate"], 0.5)
    np.testing.assert_array_equal(told["skipped"], 0)
    assert {(type(x), x.shape) for x in told.values()} == {(np.ndarray, (3,))}
    one = jax.tree.map(lambda x: x[1], state)
    assert telemetry(one) == pytest.approx({name: x[1] for name, x in told.items()}, nan_ok=True)


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
        (lambda: with_telemetry(optax.identity(), every=0), ValueError, "every must be a whole number >= 1, got 0"),
        (lambda: with_telemetry(optax.identity(), every=2.0), TypeError, "every must be a whole number >= 1, got 2.0"),
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
