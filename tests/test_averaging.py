"""The average of the weights: the formula's numbers, of the weights that are stepped, once a step that is taken."""

import functools
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite import EmaState, accumulate, ema_params, full_weights, skip_nonfinite, with_ema
from adamite.checkpoint import RefusedError, restore, save
from adamite.rounding import nearest
from adamite.sharding import state_shardings, zero1
from bits import assert_same_bits, types
from compilation import compiled

pytestmark = pytest.mark.few(2)

STORAGES = ("float32", "bfloat16")
SHAPES = {"w": (16, 256), "b": (5,), "s": ()}
ROUNDINGS = {
    jnp.float32: (None, "residual8"),
    jnp.bfloat16: (None, "nearest", "stochastic", "residual8", "residual16"),
    jnp.float16: (None, "stochastic", "residual8"),
}
CASES = [(dtype, rounding) for dtype, roundings in ROUNDINGS.items() for rounding in roundings]


def values(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def run(tx, gradients, params):
    """Parameters and states, from before the first step on. A program of its own adds the updates."""
    state, update, apply = tx.init(params), jax.jit(tx.update), jax.jit(lambda p, u: optax.apply_updates(p, u))
    path = [(params, state)]
    for g in gradients:
        updates, state = update(g, state, params)
        params = apply(params, updates)
        path.append((params, state))
    return path


def reference(weights, decay, warmup):
    """The average after each step in float64, of the weights before the first step and after each."""
    ema = np.asarray(weights[0], np.float64)
    path = [ema]
    for t, w in enumerate(weights[1:], 1):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        ema = d * ema + (1 - d) * np.asarray(w, np.float64)
        path.append(ema)
    return path


def gradients_of(dtype, steps=8):
    return [values(seed, dtype) for seed in range(1, steps + 1)]


class TestFormula:
    @pytest.mark.parametrize(("decay", "warmup"), [(0.9999, True), (0.3, True), (0.9, False), (0.0, False)])
    @pytest.mark.parametrize(("dtype", "rounding"), CASES)
    def test_against_float64(self, dtype, rounding, decay, warmup):
        tx = with_ema(adamite.adamw(1e-2, rounding=rounding), decay, warmup=warmup)
        path = run(tx, gradients_of(dtype), values(0, dtype))
        full = [full_weights(params, state) for params, state in path]
        for name in SHAPES:
            expected = reference([w[name] for w in full], decay, warmup)
            for (_, state), ema in zip(path, expected, strict=True):
                np.testing.assert_allclose(state.ema[name], ema, rtol=2e-6, atol=2e-7)
        assert {x.dtype.name for x in jax.tree.leaves(path[-1][1].ema)} == {"float32"}
        assert path[-1][1].count == 8

    def test_the_bits_are_those_of_float32_operations(self):
        path = run(with_ema(optax.identity(), 0.7), gradients_of(jnp.float32), values(0))
        ema = np.asarray(path[0][0]["w"])
        for t, (params, state) in enumerate(path[1:], 1):
            rate = max(np.float32(1 - 0.7), np.float32(9) / np.float32(10 + t))
            ema = ema + rate * (np.asarray(params["w"]) - ema)
            assert_same_bits(state.ema["w"], ema)

    def test_the_decay_may_be_a_schedule(self):
        schedule = optax.linear_schedule(0.0, 0.8, 4)
        tx = with_ema(adamite.sgd(0.1), schedule, warmup=False)
        path = run(tx, gradients_of(jnp.float32), values(0))
        ema = np.asarray(path[0][0]["w"], np.float64)
        for count, (params, state) in enumerate(path[1:]):
            d = float(schedule(count))
            ema = d * ema + (1 - d) * np.asarray(params["w"], np.float64)
            np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-6, atol=1e-7)

    def test_weights_at_rest_are_their_own_average(self):
        params = values(0)
        path = run(with_ema(adamite.sgd(0.0)), gradients_of(jnp.float32), params)
        assert_same_bits(path[-1][1].ema, params)

    def test_updates_and_inner_state_are_those_without(self):
        tx = adamite.adamw(1e-2, moments="int8")
        params, state = run(with_ema(tx), gradients_of(jnp.float32, 3), values(0))[-1]
        assert_same_bits((params, state.inner), run(tx, gradients_of(jnp.float32, 3), values(0))[-1])

    def test_complex_and_float64(self):
        params = {"z": jnp.ones(2, jnp.complex64)}
        tx = with_ema(adamite.sgd(1.0), 0.5, warmup=False)
        _, state = jax.jit(tx.update)({"z": jnp.full(2, 2 + 4j)}, tx.init(params), params)
        np.testing.assert_allclose(state.ema["z"], 0 - 2j)
        with jax.enable_x64(True):
            wide = {"w": jnp.asarray([1 / 3], jnp.float64)}
            _, state = jax.jit(with_ema(adamite.sgd(0.1), 0.9, warmup=False).update)(
                wide, with_ema(adamite.sgd(0.1)).init(wide), wide
            )
            np.testing.assert_allclose(state.ema["w"], 0.9 / 3 + 0.1 * 0.9 / 3, rtol=1e-15)


class TestBfloat16:
    @staticmethod
    def after(steps):
        """The average of weights that jump from 1 to 1.1 before the first step, each fourth from 0.1 to 0.2."""
        tx = with_ema(optax.identity(), 0.9999, warmup=False, storage="bfloat16")
        start, updates = jnp.where(jnp.arange(2**14) % 4 == 0, 0.1, 1.0), jnp.zeros(2**14)

        def step(state, _):
            return tx.update(updates, state, start + 0.1)[1], None

        return ema_params(jax.lax.scan(step, tx.init(start), length=steps)[0])

    def test_it_follows_on_average(self):
        """Its mean is the average; each element is a bfloat16 near it."""
        ema = np.asarray(jax.jit(self.after, static_argnums=0)(20_000), np.float64)
        for of_some, start in ((ema[::4], 0.1), (ema[1::4], 1.0)):
            expected = start + 0.1 * (1 - 0.9999**20_000)
            assert abs(of_some.mean() - expected) < 2e-3
            assert 0.1 * start / 256 < of_some.std() < 0.04

    def test_to_the_nearest_it_would_not_move(self):
        """A step changes it by 1e-5 at most, and bfloat16s above 1 are 1/128 apart."""
        ema = jnp.ones(())
        for _ in range(3):
            ema = nearest(ema + 1e-4 * (1.1 - ema), jnp.dtype(jnp.bfloat16))
        assert ema == 1.0

    @pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
    def test_its_dtype_and_its_distance(self, weights):
        tx = adamite.adamw(1e-2, rounding="residual8" if weights == jnp.bfloat16 else None)
        short, full = (
            run(with_ema(tx, storage=storage), gradients_of(weights), values(0, weights)) for storage in STORAGES[::-1]
        )
        for (_, a), (_, b) in zip(short, full, strict=True):
            assert {x.dtype.name for x in jax.tree.leaves(a.ema)} == {"bfloat16"}
            chex.assert_trees_all_close(ema_params(a), b.ema, rtol=2**-6, atol=2**-7)

    def test_the_first_is_the_nearest_to_the_weights(self):
        state = with_ema(adamite.sgd(0.1), storage="bfloat16").init(values(0))
        assert_same_bits(state.ema, jax.tree.map(lambda p: p.astype(jnp.bfloat16), values(0)))

    def test_its_bits_are_not_those_of_other_roundings(self):
        """Momentum and average are rounded by independent bits."""
        third = jnp.full((64, 64), 1 / 3)
        tx = with_ema(adamite.chain(adamite.trace(0.9, moments="bfloat16"), optax.scale(0.0)), storage="bfloat16")
        state = tx.init(third)._replace(ema=jnp.zeros((64, 64), jnp.bfloat16))
        _, state = jax.jit(tx.update)(third, state, third)
        momentum, ema = (np.asarray(x, np.float64) for x in (state.inner[0].inner.trace, state.ema))
        assert min(momentum.std(), ema.std()) > 1e-4
        assert abs(np.corrcoef(momentum.ravel(), ema.ravel())[0, 1]) < 0.1


class TestStepsThatAreSkipped:
    @pytest.mark.parametrize("rounding", [None, "residual8"])
    @pytest.mark.parametrize("guard", [skip_nonfinite, adamite.skip_spikes, optax.apply_if_finite])
    def test_a_guard_around_leaves_the_average_alone(self, guard, rounding):
        if guard is optax.apply_if_finite:
            rounding = None  # it needs updates of the gradients' dtypes
        dtype = jnp.bfloat16 if rounding else jnp.float32
        tx = with_ema(adamite.adamw(1e-2, rounding=rounding), storage="bfloat16")
        tx = guard(tx, 9) if guard is optax.apply_if_finite else guard(tx)
        good, bad = values(1, dtype), jax.tree.map(lambda g: g * jnp.nan, values(2, dtype))
        path = run(tx, [good, bad, values(3, dtype)], values(0, dtype))
        ema = [next(x for x in jax.tree.leaves(s, is_leaf=is_ema) if is_ema(x)) for _, s in path]
        assert_same_bits(ema[2], ema[1])
        assert [int(x.count) for x in ema] == [0, 1, 1, 2]
        clean = run(tx, [good, values(3, dtype)], values(0, dtype))
        chex.assert_trees_all_close(ema_params(path[-1][1]), ema_params(clean[-1][1]), rtol=1e-6)

    @pytest.mark.parametrize("around", ["accumulate", "MultiSteps"])
    def test_micro_batches_count_once(self, around):
        tx = with_ema(adamite.adamw(1e-2), 0.5)
        large = [jax.tree.map(lambda a, b: (a + b) / 2, values(n), values(n + 1)) for n in (1, 3)]
        expected = run(tx, large, values(0))[-1]
        tx = accumulate(tx, 2) if around == "accumulate" else optax.MultiSteps(tx, 2).gradient_transformation()
        params, state = run(tx, gradients_of(jnp.float32, 4), values(0))[-1]
        chex.assert_trees_all_close((params, ema_params(state)), (expected[0], expected[1].ema), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        "around",
        [
            skip_nonfinite,
            adamite.skip_spikes,
            lambda tx: accumulate(tx, 2),
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 3),
            lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
            lambda tx: optax.chain(optax.clip(1.0), adamite.with_telemetry(skip_nonfinite(tx))),
        ],
        ids=["skip_nonfinite", "skip_spikes", "accumulate", "MultiSteps", "apply_if_finite", "mask", "nested"],
    )
    def test_inside_they_are_refused(self, around):
        tx = with_ema(around(adamite.adam(0.1)))
        with pytest.raises(ValueError, match=re.escape("tx must not skip steps, got one with a ")) as error:
            tx.init(values(0))
        assert "skip_nonfinite(with_ema(tx))" in str(error.value)


def is_ema(node):
    return isinstance(node, EmaState)


class TestJax:
    @pytest.mark.parametrize("storage", STORAGES)
    def test_eager_jitted_and_scanned_agree(self, storage):
        tx, params = with_ema(optax.identity(), storage=storage), values(0)
        gradients = gradients_of(jnp.float32, 3)
        eager, at = tx.init(params), params
        for g in gradients:
            updates, eager = tx.update(g, eager, at)
            at = optax.apply_updates(at, updates)
        assert_same_bits((at, eager), run(tx, gradients, params)[-1])
        stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)

        def step(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        assert_same_bits(jax.lax.scan(step, (params, tx.init(params)), stacked)[0], (at, eager))

    @pytest.mark.parametrize("jitted", [False, True])
    @pytest.mark.parametrize("storage", STORAGES)
    def test_one_program_and_both_donated(self, storage, jitted):
        tx, params = with_ema(adamite.adamw(1e-2), storage=storage), values(0)
        state = (jax.jit(tx.init) if jitted else tx.init)(params)
        expected = types(state)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        gradients, before = gradients_of(jnp.float32, 5), compiled()
        for g in gradients:
            params, state = step(params, state, g)
            assert types(state) == expected
        assert compiled() - before == 1

    def test_it_moves_weights_and_average_once_each(self):
        """Twelve bytes for each weight in float32, and no memory on the way."""
        params = {"w": jnp.ones((256, 256))}

        def cost(tx):
            def step(params, state, g):
                updates, state = tx.update(g, state, params)
                return optax.apply_updates(params, updates), state

            program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
            moved, temporary = program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes
            return moved / 2**16, temporary / 2**16

        (plain, _), (moved, temporary) = cost(adamite.adamw(1e-2)), cost(with_ema(adamite.adamw(1e-2)))
        assert moved - plain < 12.1
        assert temporary < 0.1

    def test_members_of_a_vmap(self):
        tx, params = with_ema(adamite.adam(0.1), 0.5), jnp.arange(12.0).reshape(3, 4)
        _, state = jax.jit(jax.vmap(tx.update))(params, jax.vmap(tx.init)(params), params)
        _, alone = jax.jit(tx.update)(params[1], tx.init(params[1]), params[1])
        np.testing.assert_allclose(state.ema[1], alone.ema, rtol=1e-6)
        np.testing.assert_array_equal(state.count, [1, 1, 1])

    @pytest.mark.parametrize("storage", STORAGES)
    def test_in_shard_map_and_pmap(self, storage):
        tx, params = with_ema(adamite.adam(0.1), 0.5, storage=storage), jnp.arange(32.0).reshape(8, 4)
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

        def two(g, params):
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(g, state, params)
                params = optax.apply_updates(params, updates)
            return params, ema_params(state)

        expected = jax.jit(two)(params, params)
        mapped = jax.jit(jax.shard_map(two, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(params, params)
        chex.assert_trees_all_close(mapped, expected, rtol=1e-2 if storage == "bfloat16" else 1e-6)
        chex.assert_trees_all_close(
            jax.pmap(two)(params, params), expected, rtol=1e-2 if storage == "bfloat16" else 1e-6
        )


class TestStep:
    @pytest.mark.parametrize("engine", ["xla", "auto", "pallas"])
    @pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, None), (jnp.bfloat16, "residual8")])
    def test_the_average_is_of_the_weights_that_the_engine_left(self, engine, dtype, rounding):
        tx, params = with_ema(adamite.adamw(1e-2, rounding=rounding), 0.5, warmup=False), values(0, dtype)
        step, state = jax.jit(functools.partial(tx.step, engine=engine)), tx.init(params)
        ema = full_weights(params, state)
        for g in gradients_of(dtype, 3):
            params, state = step(g, state, params)
            ema = jax.tree.map(lambda m, w: (m + w) / 2, ema, full_weights(params, state))
        chex.assert_trees_all_close(state.ema, ema, rtol=1e-6)
        assert state.count == 3

    def test_around_and_inside_of_others(self):
        tx = accumulate(skip_nonfinite(with_ema(adamite.adamw(1e-2))), 2)
        params = values(0)
        state = tx.init(params)
        for g in gradients_of(jnp.float32, 4):
            params, state = jax.jit(functools.partial(tx.step, engine="xla"))(g, state, params)
        assert state.inner.inner.count == 2
        expected = run(tx, gradients_of(jnp.float32, 4), values(0))[-1][1]
        chex.assert_trees_all_close(ema_params(state), ema_params(expected), rtol=1e-6)


class TestDevices:
    @pytest.mark.parametrize("how", ["eager", "jit"])
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_it_is_born_where_the_parameters_are(self, kind, storage, how):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        sharding = NamedSharding(mesh, P("data", "model"))
        params = {"w": jax.device_put(values(0)["w"], sharding)}
        tx = with_ema(adamite.adamw(1e-2), storage=storage)
        state = (jax.jit(tx.init) if how == "jit" else tx.init)(params)
        assert len(state.count.sharding.device_set) == 8
        for _ in range(2):
            assert jax.tree.leaves(state.ema)[0].sharding.is_equivalent_to(sharding, 2)
            averages = ema_params(state, params)
            assert averages["w"].sharding.is_equivalent_to(sharding, 2)
            chex.assert_trees_all_close(averages, params, rtol=0.1, atol=0.01)
            _, state = jax.jit(tx.update)(params, state, params)

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_zero1_spreads_it_and_its_bits_are_those_of_one_device(self, kind, storage):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        tx = with_ema(adamite.adamw(1e-2, moments="int8", rounding="residual8"), storage=storage)
        spread, place = zero1(tx, mesh), functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        params, gradients = values(0, jnp.bfloat16), gradients_of(jnp.bfloat16, 3)
        there, state = run(spread, map(place, gradients), place(params))[-1]
        assert_same_bits((there, state), run(tx, gradients, params)[-1])
        expected = state_shardings(spread, place(params))
        for x, sharding in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected.ema), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        assert (2, 256) in {x.addressable_shards[0].data.shape for x in jax.tree.leaves(state.ema)}


class TestLeaves:
    def test_a_weight_without_a_gradient_is_averaged(self):
        tx, params = with_ema(adamite.adam(1.0), 0.5, warmup=False), {"a": jnp.zeros(2), "b": jnp.ones(2)}
        state = tx.init(params)._replace(ema={"a": jnp.zeros(2), "b": jnp.zeros(2)})
        updates, state = jax.jit(tx.update)({"a": jnp.ones(2), "b": None}, state, params)
        assert updates["b"] is None
        np.testing.assert_allclose(state.ema["a"], -0.5, rtol=1e-5)
        np.testing.assert_array_equal(state.ema["b"], 0.5)

    def test_frozen_weights_stay_their_own_average(self):
        labels = {"w": "train", "b": "frozen", "s": "train"}
        tx = optax.partition({"train": adamite.adamw(1e-2), "frozen": optax.set_to_zero()}, labels)
        params, state = run(with_ema(tx), gradients_of(jnp.float32), values(0))[-1]
        assert_same_bits(state.ema["b"], params["b"])
        assert not np.array_equal(state.ema["w"], params["w"])

    def test_groups_and_what_has_no_average(self):
        labels = {"w": "train", "b": "frozen", "s": "head"}
        train, head = with_ema(adamite.adamw(1e-2)), with_ema(adamite.sgd(1e-2), storage="bfloat16")
        one = optax.partition({"train": train, "head": adamite.sgd(1e-2), "frozen": optax.set_to_zero()}, labels)
        two = optax.partition({"train": train, "head": head, "frozen": optax.set_to_zero()}, labels)
        whole = run(with_ema(adamite.adamw(1e-2)), gradients_of(jnp.float32), values(0))[-1][1]
        for tx, head_averaged in ((one, False), (two, True)):
            params, state = run(tx, gradients_of(jnp.float32), values(0))[-1]
            averages = ema_params(state, params)
            np.testing.assert_allclose(averages["w"], whole.ema["w"], rtol=1e-5)
            assert_same_bits(averages["b"], params["b"])
            assert (averages["s"] != params["s"]) == head_averaged
            assert {x.dtype.name for x in jax.tree.leaves(averages)} == {"float32"}
        with pytest.raises(ValueError, match=re.escape("state holds 2 averages, of parts of the parameters: call")):
            ema_params(state)

    @pytest.mark.parametrize("rounding", ["residual8", "residual16"])
    def test_residuals_of_groups_are_folded_in(self, rounding):
        """`full_weights` finds those of each group."""
        labels = {"w": "first", "b": "second", "s": "frozen"}
        groups = {"first": adamite.adamw(1e-3, rounding=rounding), "second": adamite.sgd(1e-3, rounding=rounding)}
        tx = optax.partition(groups | {"frozen": optax.set_to_zero()}, labels)
        path = run(with_ema(tx, 0.5), gradients_of(jnp.bfloat16), values(0, jnp.bfloat16))
        full = [full_weights(params, state) for params, state in path]
        assert not np.array_equal(full[-1]["w"], path[-1][0]["w"].astype(jnp.float32))
        for name in SHAPES:
            expected = reference([w[name] for w in full], 0.5, warmup=True)[-1]
            np.testing.assert_allclose(path[-1][1].ema[name], expected, rtol=1e-6)

    def test_whole_numbers_have_none(self):
        tx = with_ema(optax.masked(adamite.adamw(1e-2, rounding="residual8"), {"w": True, "n": False}))
        params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(3)}
        _, state = jax.jit(tx.update)({"w": params["w"], "n": jnp.zeros(3, jnp.int32)}, tx.init(params), params)
        assert state.ema["n"] is None
        assert ema_params(state, params)["n"] is params["n"]

    @pytest.mark.parametrize("tx", [adamite.adamw(1e-2), optax.sgd(1e-2)], ids=["adamite", "optax"])
    def test_an_equinox_model_with_functions_in_it(self, tx):
        tx, model = with_ema(tx, 0.5), eqx.nn.MLP(3, 1, 7, 1, key=jax.random.key(0))
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, state, x):
            grads = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
            updates, state = tx.update(grads, state, model)
            return eqx.apply_updates(model, updates), state

        before = model
        model, state = step(model, state, jnp.ones((4, 3)))
        averaged = ema_params(state, model)
        assert averaged.activation is model.activation
        rate = 9 / 11
        np.testing.assert_allclose(
            averaged.layers[0].weight,
            before.layers[0].weight + rate * (model.layers[0].weight - before.layers[0].weight),
            rtol=1e-5,
        )
        assert jax.vmap(averaged)(jnp.ones((4, 3))).shape == (4, 1)

    def test_flax_nnx(self):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, with_ema(adamite.adamw(1e-2), 0.5, warmup=False), wrt=nnx.Param)
        before = jnp.array(model.kernel[...])
        before_update = with_ema(adamite.adamw(1e-2)).init(
            {"kernel": before, "bias": jnp.zeros(2)}
        )  # without variables

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 3))) ** 2))(model))

        step(model, optimizer)
        weights = nnx.state(model, nnx.Param)
        averages = ema_params(optimizer.opt_state, weights)
        assert jax.tree.structure(averages) == jax.tree.structure(weights)
        pure = jax.tree.unflatten(jax.tree.structure(before_update), jax.tree.leaves(optimizer.opt_state))
        assert_same_bits(ema_params(pure, weights), averages)
        expected = (before + model.kernel[...]) / 2
        nnx.update(model, averages)
        np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-6)

    def test_models_that_init_sees_whole(self):
        model = eqx.nn.MLP(3, 1, 7, 1, key=jax.random.key(0))
        state = with_ema(optax.sgd(1e-2)).init(model)
        assert state.ema.activation is None
        assert_same_bits(jax.tree.leaves(state.ema), jax.tree.leaves(eqx.filter(model, eqx.is_array)))


class TestEmaParams:
    def test_dtypes(self):
        params, state = run(with_ema(adamite.adamw(1e-2)), gradients_of(jnp.bfloat16, 2), values(0, jnp.bfloat16))[-1]
        assert {x.dtype.name for x in jax.tree.leaves(ema_params(state))} == {"float32"}
        assert types(ema_params(state, params)) == types(params)
        abstract = jax.eval_shape(lambda: params)
        assert_same_bits(ema_params(state, abstract), ema_params(state, params))

    def test_a_single_array(self):
        for params in (jnp.ones(3), jnp.ones(()), 2.0):
            state = with_ema(adamite.sgd(0.1)).init(params)
            np.testing.assert_array_equal(ema_params(state, params), params)

    def test_of_two_the_outer(self):
        tx = with_ema(with_ema(adamite.sgd(0.1), 0.5), 0.9)
        state = run(tx, gradients_of(jnp.float32, 2), values(0))[-1][1]
        assert ema_params(state) is not state.ema
        assert_same_bits(ema_params(state), state.ema)
        assert_same_bits(ema_params(state.inner), state.inner.ema)

    def test_refusals(self):
        state = with_ema(adamite.sgd(0.1)).init(values(0))
        with pytest.raises(ValueError, match=re.escape("state must hold an EmaState, as that of with_ema(tx) does")):
            ema_params(adamite.adam(0.1).init(values(0)))
        with pytest.raises(ValueError, match=re.escape("must be those that were averaged, got none at params['b']")):
            ema_params(state, {"w": jnp.ones((16, 256))})
        with pytest.raises(ValueError, match=re.escape("params['b'] has shape (6,), but its average has (5,)")):
            ema_params(state, values(0) | {"b": jnp.ones(6)})


class TestOthers:
    def test_bytes_are_counted_beside_the_parameter(self):
        params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
        adamw = adamite.adamw(1e-3, moments="int8", rounding="residual8")
        plain, full, half = (
            adamite.memory_report(tx, params)
            for tx in (adamw, *(with_ema(adamw, storage=storage) for storage in STORAGES))
        )
        assert full.leaves[0].bytes.state - plain.leaves[0].bytes.state == 4 * 64 * 256
        assert half.leaves[0].bytes.state - plain.leaves[0].bytes.state == 2 * 64 * 256
        assert {report.leaves[0].moments for report in (plain, full, half)} == {"int8"}
        assert full.other - plain.other == 4

    def test_convert_moments_leaves_it_alone(self):
        tx = with_ema(adamite.adamw(1e-2), storage="bfloat16")
        state = run(tx, gradients_of(jnp.float32, 2), values(0))[-1][1]
        lean = adamite.convert_moments(state, "int8")
        assert lean.ema["w"] is state.ema["w"]
        assert lean.inner[0].mu.codes["w"].dtype == jnp.int8

    def test_checkpoints_hold_it_and_know_the_decay(self, tmp_path):
        tx = skip_nonfinite(with_ema(adamite.adamw(1e-2), 0.99, storage="bfloat16"))
        tree = run(tx, gradients_of(jnp.float32, 2), values(0))[-1]
        save(tmp_path, 2, tree, tx)
        assert_same_bits(restore(tmp_path, jax.eval_shape(lambda: tree), tx).tree, tree)
        other = skip_nonfinite(with_ema(adamite.adamw(1e-2), 0.999, storage="bfloat16"))
        with pytest.raises(RefusedError, match=r"optimizer\.tx\.decay: saved 0\.99, now 0\.999"):
            restore(tmp_path, jax.eval_shape(lambda: tree), other)

    def test_telemetry_reads_through_it(self):
        told = adamite.telemetry(
            run(adamite.with_telemetry(with_ema(adamite.adam(0.1))), gradients_of(jnp.float32, 2), values(0))[-1][1]
        )
        assert told["learning_rate"] == pytest.approx(0.1)
        assert "mu_norm" in told


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: with_ema(3), TypeError, "tx must be a gradient transformation, got 3 of type int"),
        (lambda: with_ema(optax.identity(), 1), ValueError, "decay must lie in [0, 1), got 1.0"),
        (lambda: with_ema(optax.identity(), -0.1), ValueError, "decay must lie in [0, 1), got -0.1"),
        (lambda: with_ema(optax.identity(), np.nan), ValueError, "decay must lie in [0, 1), got nan"),
        (lambda: with_ema(optax.identity(), "x"), TypeError, "decay must be a number or an array of shape (), got 'x'"),
        (lambda: with_ema(optax.identity(), warmup=1), TypeError, "warmup must be True or False, got 1 of type int"),
        (
            lambda: with_ema(optax.identity(), storage="int4"),
            ValueError,
            "storage must be one of 'float32', 'bfloat16'",
        ),
        (
            lambda: with_ema(optax.identity(), storage=jnp.int8),
            TypeError,
            "storage must be one of 'float32', 'bfloat16'",
        ),
    ],
)
def test_arguments(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


def test_updates_and_states():
    tx, params = with_ema(adamite.sgd(0.1)), {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(TypeError, match="state must be an EmaState, got tuple"):
        tx.update(params, adamite.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match=re.escape("with_ema averages params, got None: call update(updates, state")):
        tx.update(params, state)
    with pytest.raises(ValueError, match=re.escape("updates['w'] has shape (3,), but ema['w'] has shape (2,)")):
        tx.update(params, state._replace(ema={"w": jnp.ones(2)}), params)
    with pytest.raises(ValueError, match=re.escape("updates['w'] has no counterpart in ema")):
        tx.update(params, state._replace(ema={"v": jnp.ones(3)}), params)
    with pytest.raises(ValueError, match="of a complex parameter cannot be kept in bfloat16"):
        with_ema(adamite.sgd(0.1), storage="bfloat16").init({"z": jnp.ones(2, jnp.complex64)})
    with pytest.raises(TypeError, match=re.escape("params['w'] has dtype int32")):
        with_ema(adamite.adam(0.1)).init({"w": jnp.ones(3, jnp.int32)})
