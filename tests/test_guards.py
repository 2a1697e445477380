"""Guards: a bad step leaves no trace, every bad step is told, and no good one is left out."""

import functools
import itertools
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
from adamite import SkipState, skip_nonfinite, skip_spikes
from adamite.core.skipping import branched, undone
from adamite.sharding import zero1
from bits import assert_same_bits, types
from compilation import compiled

pytestmark = pytest.mark.few(2)

SHAPES = {"w": (32, 256), "b": (5,), "s": ()}
STEPS = 4

STORAGES = {
    "float32": (jnp.float32, {}),
    "bfloat16, stochastic": (jnp.bfloat16, {"moments": "bfloat16", "rounding": "stochastic"}),
    "int8, residual8": (jnp.bfloat16, {"moments": "int8", "rounding": "residual8"}),
    "int8, float8": (jnp.float32, {"moments": ("int8", "float8")}),
}
ORDERS = {
    "nonfinite": skip_nonfinite,
    "spikes": lambda tx: skip_spikes(tx, window=2, factor=1e3),
    "nonfinite of spikes": lambda tx: skip_nonfinite(skip_spikes(tx, window=2, factor=1e3)),
    "behind a clip": lambda tx: adamite.chain(optax.clip_by_global_norm(1.0), skip_nonfinite(tx)),
    "of masked": lambda tx: skip_nonfinite(optax.masked(tx, {"w": True, "b": True, "s": True})),
}
FAULTS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e30": 1e30, "-0": -0.0, "subnormal": 1e-40}
HARMLESS = ("-0", "subnormal")


def values(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


@functools.cache
def programs(order, storage):
    dtype, choice = STORAGES[storage]
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    tx = ORDERS[order](adamite.adamw(schedule, **choice))
    return values(0, dtype), tx, jax.jit(tx.update), jax.jit(optax.apply_updates)


def guard_of(state):
    """What the guards tell together, and what the innermost guards."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SkipState))
    guard = next(x for x in found if isinstance(x, SkipState))
    if not isinstance(guard.inner, SkipState):
        return guard
    inner = guard.inner
    return inner._replace(skipped=guard.skipped + inner.skipped, consecutive=guard.consecutive + inner.consecutive)


@functools.cache
def clean(order, storage):
    """Parameters and guarded states of a run that sees nothing bad, from before the first step on."""
    params, tx, update, apply = programs(order, storage)
    state = tx.init(params)
    path = [(params, state)]
    for seed in range(1, STEPS + 1):
        updates, state = update(values(seed, params["w"].dtype), state, params)
        params = apply(params, updates)
        path.append((params, state))
    return path


SOON = ("float32", "int8, residual8")
"""All orders for float32; one for the other storages, the rest of which are slow."""
CASES = [
    pytest.param(*case, marks=[] if case[0] == "nonfinite" or case[1] == "float32" else pytest.mark.slow)
    for case in itertools.product(ORDERS, STORAGES, FAULTS, SHAPES, (0, 3))
]


@pytest.mark.parametrize(("order", "storage", "fault", "leaf", "when"), CASES)
def test_a_fault_leaves_no_trace(order, storage, fault, leaf, when):
    path = clean(order, storage)
    _, _, update, apply = programs(order, storage)
    params, state = path[when]
    good = values(when + 1, params["w"].dtype)
    bad = good | {leaf: good[leaf].at[(0,) * good[leaf].ndim].set(FAULTS[fault])}
    updates, after = update(bad, state, params)
    clipped = order == "behind a clip" and fault == "1e30"  # the norm overflows, the clip makes 0 of everything
    if fault in HARMLESS or clipped:
        assert guard_of(after).skipped == 0
        chex.assert_tree_all_finite(jax.tree.map(lambda x: x.astype(jnp.float32), (apply(params, updates), after)))
        return
    assert guard_of(after).skipped == 1
    assert guard_of(after).consecutive == 1
    assert_same_bits(apply(params, updates), params)
    assert_same_bits(guard_of(after).inner, guard_of(state).inner)
    for seed in range(when + 1, STEPS + 1):
        updates, after = update(values(seed, params["w"].dtype), after, params)
        params = apply(params, updates)
    assert guard_of(after).consecutive == 0
    last, state = path[-1]
    assert_same_bits(params, last)
    assert_same_bits(guard_of(after)._replace(skipped=0), guard_of(state)._replace(skipped=0))


def test_there_are_five_hundred_cases():
    assert len(CASES) >= 500


def run(tx, gradients, params, jit=True):
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


class TestWhatIsLookedAt:
    def test_an_update_that_is_no_number_though_the_gradient_is(self):
        params, state = run(skip_nonfinite(adamite.adam(0.1, eps=0.0)), [jnp.zeros(3)], jnp.ones(3))
        assert state.skipped == 1
        np.testing.assert_array_equal(params, 1.0)

    def test_a_schedule_that_is_no_number_for_a_while(self):
        tx = skip_nonfinite(adamite.sgd(lambda count: jnp.where(count == 1, jnp.nan, 0.1)))
        _, state = run(tx, [jnp.ones(3)] * 3, jnp.ones(3))
        assert (state.skipped, state.consecutive) == (2, 2)  # its count stays where it is

    def test_states_that_begin_infinite_may_stay_so(self):
        tx = skip_nonfinite(optax.contrib.reduce_on_plateau(accumulation_size=2))
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=1.0)
        assert state.skipped == 0
        assert state.inner.best_value == jnp.inf
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.nan)
        assert state.skipped == 1
        assert state.inner.count == 0

    def test_absent_gradients(self):
        tx = skip_nonfinite(adamite.adam(0.1))
        params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        state = tx.init(params)
        for g in (1.0, jnp.nan):
            updates, state = jax.jit(tx.update)({"a": jnp.full(2, g), "b": None}, state, params)
        assert updates["b"] is None
        assert state.skipped == 1

    def test_minus_zero_stays(self):
        tx = skip_nonfinite(adamite.adam(0.1))
        params, _ = run(tx, [jnp.full(2, jnp.nan)], jnp.array([-0.0, 0.0]))
        assert_same_bits(params, jnp.array([-0.0, 0.0]))


class TestTelling:
    def test_gave_up_stays_said_and_steps_are_judged_as_before(self):
        tx = skip_nonfinite(adamite.adam(0.1), max_consecutive=2)
        state, told = tx.init(jnp.ones(2)), []
        for g in (jnp.nan, 1.0, jnp.nan, jnp.nan, jnp.nan, 1.0):
            _, state = tx.update(jnp.full(2, g), state)
            told.append((int(state.skipped), int(state.consecutive), bool(state.gave_up), int(state.inner[0].count)))
        assert told == [
            (1, 1, False, 0), (1, 0, False, 1), (2, 1, False, 1), (3, 2, True, 1), (4, 3, True, 1), (4, 0, True, 2),
        ]  # fmt: skip
        chex.assert_tree_all_finite(state)

    def test_without_a_limit_never(self):
        _, state = run(skip_nonfinite(adamite.adam(0.1)), [jnp.full(2, jnp.inf)] * 20, jnp.ones(2))
        assert (state.skipped, state.consecutive, state.gave_up) == (20, 20, False)


class TestSpikes:
    def reference(self, norms, window, factor):
        """Which steps are left out, in float64."""
        seen, left_out = [], []
        for norm in norms:
            last = seen[-window:]
            allowed = np.inf
            if len(seen) >= window // 2:
                allowed = np.mean(last) + factor * max(np.std(last), np.mean(last) / 100)
            left_out.append(norm > allowed)
            seen.append(min(norm, allowed))
        return left_out

    @pytest.mark.parametrize(("window", "factor"), [(2, 3.0), (8, 1.5), (8, 6.0), (128, 2.0), (128, 6.0)])
    def test_as_the_reference(self, window, factor):
        rng = np.random.default_rng(window)
        norms = rng.lognormal(0, 0.3, 400) * np.where(np.arange(400) > 300, 30, 1)
        norms[::41] *= 1e3
        tx = skip_spikes(optax.identity(), window=window, factor=factor)

        def step(state, norm):
            _, state = tx.update(jnp.full(4, norm / 2), state)
            return state, state.skipped

        _, skipped = jax.lax.scan(step, tx.init(jnp.zeros(4)), jnp.asarray(norms, jnp.float32))
        expected = self.reference(norms, window, factor)
        np.testing.assert_array_equal(np.diff(np.asarray(skipped), prepend=0), expected)
        assert sum(expected) > 5

    def test_a_lasting_change_is_learnt(self):
        tx = skip_spikes(optax.identity(), window=16)
        _, state = run(tx, [jnp.ones(2)] * 20 + [jnp.full(2, 100.0)] * 100, jnp.zeros(2))
        assert 1 < state.skipped < 60
        assert state.consecutive == 0

    def test_steady_gradients_are_no_spikes(self):
        rng = np.random.default_rng(0)
        gradients = [jnp.asarray(rng.permutation(1000) / 7.0, jnp.float32) for _ in range(40)]
        _, state = run(skip_spikes(optax.identity(), window=16, factor=0.5), gradients, jnp.zeros(1000))
        assert state.skipped == 0

    def test_nan_is_left_out_and_not_recorded(self):
        _, state = run(skip_spikes(optax.identity(), window=4), [jnp.ones(2), jnp.full(2, jnp.nan)], jnp.zeros(2))
        assert (state.skipped, state.norms.count) == (1, 1)
        chex.assert_tree_all_finite(state)


class TestLoss:
    def steps(self, tx, losses, gradients=None, name="loss"):
        """Which steps are left out, and the last state."""
        gradients = jnp.ones(len(losses)) if gradients is None else jnp.asarray(gradients)

        def step(state, now):
            g, loss = now
            _, state = tx.update(jnp.full(4, g), state, jnp.zeros(4), **{name: loss})
            return state, state.skipped

        state, skipped = jax.lax.scan(step, tx.init(jnp.zeros(4)), (gradients, jnp.asarray(losses, jnp.float32)))
        return np.diff(np.asarray(skipped), prepend=0).tolist(), state

    @pytest.mark.parametrize(("window", "factor", "level"), [(8, 1.5, 3.0), (128, 6.0, 3.0), (8, 3.0, -40.0)])
    def test_judged_as_norms_are(self, window, factor, level):
        rng = np.random.default_rng(window)
        losses = level + rng.standard_normal(300)
        losses[::41] += 50
        skipped, _ = self.steps(skip_spikes(adamite.adam(0.1), window=window, factor=factor, loss=True), losses)
        seen, expected = [], []
        for loss in losses:
            last, allowed = seen[-window:], np.inf
            if len(seen) >= window // 2:
                allowed = np.mean(last) + factor * max(np.std(last), abs(np.mean(last)) / 100)
            expected.append(int(loss > allowed))
            seen.append(min(loss, allowed))
        assert skipped == expected
        assert sum(expected) > 3

    def test_a_steady_negative_loss_is_no_spike(self):
        losses = -40 + np.where(np.arange(40) % 2, 1e-4, -1e-4)
        losses[30] = -39.9
        skipped, _ = self.steps(skip_spikes(adamite.adam(0.1), window=8, loss=True), losses)
        assert sum(skipped) == 0

    def test_norms_are_judged_too(self):
        gradients = np.where(np.arange(20) == 12, 1e3, 1.0)
        skipped, state = self.steps(skip_spikes(adamite.adam(0.1), window=8, loss=True), np.ones(20), gradients)
        assert skipped == [int(n == 12) for n in range(20)]
        assert state.inner[0].count == 19

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_loss_that_is_not_finite_is_left_out_and_not_recorded(self, bad):
        skipped, state = self.steps(skip_spikes(adamite.adam(0.1), window=8, loss=True), [1.0, bad, 1.0])
        assert skipped == [0, 1, 0]
        assert (state.norms.losses.count, state.norms.norms.count) == (2, 2)
        chex.assert_tree_all_finite(state)

    def test_value_is_another_name_and_goes_on(self):
        tx = skip_spikes(optax.contrib.reduce_on_plateau(accumulation_size=1), window=8, loss=True)
        skipped, state = self.steps(tx, [1.0] * 10 + [90.0, 2.0], name="value")
        assert skipped == [0] * 10 + [1, 1]
        assert state.inner.best_value == 1.0

    def test_without_loss_it_goes_on_unseen(self):
        skipped, state = self.steps(skip_spikes(adamite.adam(0.1), window=8), [1.0] * 10 + [np.nan])
        assert sum(skipped) == 0
        assert state.norms.count == 11

    def test_steps_are_told_and_donated(self):
        tx, params = skip_spikes(adamite.adam(0.1), window=4, loss=True), jnp.ones(3)
        step = jax.jit(lambda p, s, loss: tx.step(p, s, p, loss=loss), donate_argnums=(0, 1))
        state = tx.init(params)
        for loss in (1.0, 2, jnp.bfloat16(1.5)):
            params, state = step(params, state, loss)
        before = np.asarray(params)
        params, state = step(params, state, np.float64(90.0))
        assert state.skipped == 1
        np.testing.assert_array_equal(params, before)

    def test_in_accumulate_it_is_the_last_micro_batchs(self):
        tx = adamite.accumulate(skip_spikes(adamite.adam(0.1), window=4, loss=True), 2)
        state, update = tx.init(jnp.ones(3)), jax.jit(tx.update)
        for loss in [1.0, 1.0] * 3 + [90.0, 1.0, 1.0, 90.0]:
            _, state = update(jnp.ones(3), state, jnp.ones(3), loss=loss)
        assert state.inner.skipped == 1
        assert state.inner.inner[0].count == 4

    @pytest.mark.parametrize("check", [True, False])
    def test_of_devices_it_is_the_mean(self, check):
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        tx = skip_spikes(adamite.sgd(0.1), window=4, loss=True, axis_name="i")
        state = tx.init(jnp.ones(8))

        def update(g, state, losses):
            return tx.update(g, state, g, loss=losses[0])[1]

        like = jax.tree.map(lambda _: P(), state)
        update = jax.jit(
            jax.shard_map(update, mesh=mesh, in_specs=(P("i"), like, P("i")), out_specs=like, check_vma=check)
        )
        for _ in range(3):
            state = update(jnp.ones(8), state, jnp.arange(8.0))
        np.testing.assert_allclose(state.norms.losses.values[:3], 3.5)
        assert update(jnp.ones(8), state, jnp.arange(8.0).at[3].set(300.0)).skipped == 1

    @pytest.mark.parametrize(
        ("extra", "error", "text"),
        [
            ({}, TypeError, "loss is missing: skip_spikes was built with loss=True"),
            ({"loss": None}, TypeError, "loss is missing"),
            ({"loss": jnp.ones(8)}, ValueError, "loss must be a real number or an array of shape (), got shape (8,)"),
            ({"value": jnp.ones(8)}, ValueError, "value must be a real number or an array of shape (), got shape (8,)"),
            ({"loss": "1"}, TypeError, "loss must be a real number or an array of shape (), got '1'"),
            ({"loss": True}, TypeError, "loss must be a real number"),
            ({"loss": 1j}, TypeError, "loss must be a real number"),
        ],
    )
    @pytest.mark.parametrize("way", ["update", "step"])
    def test_what_is_no_loss(self, way, extra, error, text):
        tx, params = skip_spikes(adamite.adam(0.1), loss=True), jnp.ones(3)
        with pytest.raises(error, match=re.escape(text)):
            getattr(tx, way)(params, tx.init(params), params, **extra)

    def test_states_of_the_other_kind(self):
        params = jnp.ones(3)
        one, other = (skip_spikes(adamite.adam(0.1), loss=loss) for loss in (False, True))
        with pytest.raises(TypeError, match="with norms of window 128 and no losses"):
            one.update(params, other.init(params), params)
        with pytest.raises(TypeError, match="with norms of window 128 and losses"):
            other.update(params, one.init(params), params, loss=1.0)


@pytest.mark.more
def test_eager_is_jitted():
    tx, params = skip_spikes(adamite.adam(0.1, moments="int8"), window=2), values(0)
    gradients = [values(1), values(2), jax.tree.map(lambda g: g * jnp.nan, values(3)), values(4)]
    eager, jitted = (run(tx, gradients, params, jit)[1] for jit in (False, True))
    chex.assert_trees_all_close(eager.inner, jitted.inner, rtol=1e-5)
    assert eager.skipped == jitted.skipped == 1
    assert types(eager) == types(jitted)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("guard", "storage"),
    [
        pytest.param(guard, storage, marks=[] if (guard is skip_nonfinite) == (storage in SOON) else pytest.mark.slow)
        for guard, storage in itertools.product((skip_nonfinite, skip_spikes), STORAGES)
    ],
)
def test_one_program_scanned_and_donated(guard, storage):
    dtype, choice = STORAGES[storage]
    tx, params = guard(adamite.adamw(1e-2, **choice)), values(0, dtype)
    step = jax.jit(lambda g, state, params: tx.update(g, state, params), donate_argnums=1)
    state = tx.init(params)
    gradients = [values(1, dtype), jax.tree.map(lambda g: g * jnp.nan, values(1, dtype)), values(2, dtype)]
    expected, before = types(state), compiled()
    for g in gradients:
        _, state = step(g, state, params)
        assert types(state) == expected
    assert compiled() - before == 1
    stacked = jax.tree.map(lambda *g: jnp.stack(g), values(1, dtype), values(2, dtype))
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s, params)[1], None), tx.init(params), stacked)
    assert state.skipped == 0


@pytest.mark.parametrize("wanted", [False, True])
def test_a_step_undone_is_a_branch(wanted):
    """What TPUs run gives the bits of what is run here."""
    tx, params = adamite.adamw(1e-2, moments="int8"), values(0)
    state, g = tx.init(params), values(1)

    def way(how):
        def step(wanted, state):
            return how(wanted, lambda: tx.update(g, state, params), lambda: (jax.tree.map(jnp.zeros_like, g), state))

        return jax.jit(step)(wanted, state)

    assert_same_bits(way(undone), way(branched))


def test_tpus_undo_and_others_branch():
    tx, params = skip_nonfinite(adamite.adam(1e-2)), jnp.ones(8)
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    for platform, way in {"cpu": 1, "cuda": 1, "tpu": 0}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        chosen = re.search(
            r"%(c\w*) = stablehlo.constant dense<(\d)> : tensor<i32>\n *%\d+ = \"stablehlo.case\"\(%\1\)", text
        )
        assert int(chosen[2]) == way


def test_members_of_a_vmap_decide_for_themselves():
    tx = skip_nonfinite(adamite.adam(0.1))
    params = jnp.ones((3, 4))
    g = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    updates, state = jax.jit(jax.vmap(tx.update))(g, jax.vmap(tx.init)(params), params)
    np.testing.assert_array_equal(state.skipped, [0, 1, 0])
    np.testing.assert_array_equal(state.inner[0].count, [1, 0, 1])
    np.testing.assert_array_equal(updates[1], 0)


GUARDS = {"nonfinite": skip_nonfinite, "spikes": functools.partial(skip_spikes, window=2)}


class TestDevices:
    @pytest.mark.parametrize("guard", GUARDS)
    def test_pmap_replicas_decide_as_one(self, guard):
        tx, params = GUARDS[guard](adamite.adam(0.1), axis_name="i"), jnp.ones(4)
        state = tx.init(params)
        replicas = jax.tree.map(lambda x: jnp.stack([x] * 8), (state, params))
        g = jnp.ones((8, 4)).at[5, 1].set(jnp.nan)  # not averaged
        updates, state = jax.pmap(tx.update, axis_name="i")(g, *replicas)
        np.testing.assert_array_equal(state.skipped, 1)
        np.testing.assert_array_equal(updates, 0)

    @pytest.mark.parametrize("guard", GUARDS)
    @pytest.mark.parametrize("check", [True, False])
    def test_parts_in_shard_map_decide_as_one(self, guard, check):
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        tx = GUARDS[guard](adamite.adam(0.1), axis_name="i")
        params = {"cut": jnp.ones((8, 4)), "whole": jnp.ones(3)}
        specs = {"cut": P("i"), "whole": P()}
        state = tx.init(params)
        like = jax.tree.map(lambda x: P(), state)
        moments = like.inner[0]._replace(mu=specs, nu=specs)
        like = like._replace(inner=(moments, *like.inner[1:]))
        update = jax.jit(
            jax.shard_map(tx.update, mesh=mesh, in_specs=(specs, like, specs), out_specs=(specs, like), check_vma=check)
        )
        good = jax.tree.map(jnp.ones_like, params)
        _, state = update(good, state, params)
        if guard == "spikes":
            whole = 3 if check else 8 * 3  # unchecked, no one knows which leaves are cut
            np.testing.assert_allclose(state.norms.values[0], np.sqrt(32 + whole), rtol=1e-6)
        bad = good | {"cut": good["cut"].at[6, 0].set(jnp.nan)}
        updates, after = update(bad, state, params)
        assert after.skipped == 1
        assert_same_bits(after.inner, state.inner)
        np.testing.assert_array_equal(updates["cut"], 0)

    @pytest.mark.parametrize(
        ("guard", "storage", "kind"),
        [
            ("nonfinite", "int8, residual8", AxisType.Auto),
            ("spikes", "float32", AxisType.Explicit),
            pytest.param("spikes", "int8, residual8", AxisType.Explicit, marks=pytest.mark.slow),
            pytest.param("nonfinite", "float32", AxisType.Auto, marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.more
    def test_spread_by_zero1_as_on_one_device(self, guard, storage, kind):
        dtype, choice = STORAGES[storage]
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        tx = GUARDS[guard](adamite.adamw(1e-2, **choice))
        gradients = [values(1, dtype), values(2, dtype), values(3, dtype)]
        gradients[1]["w"] = gradients[1]["w"].at[20, 200].set(jnp.nan)
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        update, spread = jax.jit(tx.update), zero1(tx, mesh)
        spread_update = jax.jit(spread.update)
        params, state = values(0, dtype), tx.init(values(0, dtype))
        there = place(params)
        spread_state, before = spread.init(there), compiled()
        for number, g in enumerate(gradients):
            _, state = update(g, state, params)
            _, spread_state = spread_update(place(g), spread_state, there)
            if number == 0:
                before = compiled()
        assert compiled() - before == 0
        assert state.skipped == 1
        assert_same_bits(spread_state._replace(norms=()), state._replace(norms=()))
        chex.assert_trees_all_close(spread_state.norms, state.norms, rtol=1e-6)
        moment = jax.tree.leaves(spread_state.inner[0].mu)[-1]
        assert moment.addressable_shards[0].data.size < moment.size
        assert len(spread_state.skipped.sharding.device_set) == 8


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: skip_nonfinite(3), TypeError, "tx must be a gradient transformation, got 3 of type int"),
        (lambda: skip_nonfinite(adamite.adam), TypeError, "tx must be a gradient transformation"),
        (lambda: skip_nonfinite(optax.identity(), 0), ValueError, "max_consecutive must be a whole number >= 1, got 0"),
        (lambda: skip_nonfinite(optax.identity(), -3), ValueError, "max_consecutive must be a whole number >= 1"),
        (lambda: skip_nonfinite(optax.identity(), 2.0), TypeError, "got 2.0 of type float"),
        (lambda: skip_nonfinite(optax.identity(), True), TypeError, "got True of type bool"),
        (lambda: skip_nonfinite(optax.identity(), axis_name=3), TypeError, "axis_name must be None, a string or a"),
        (lambda: skip_spikes("adam"), TypeError, "tx must be a gradient transformation, got 'adam' of type str"),
        (lambda: skip_spikes(optax.identity(), window=1), ValueError, "window must be a whole number >= 2, got 1"),
        (lambda: skip_spikes(optax.identity(), window=8.5), TypeError, "window must be a whole number >= 2, got 8.5"),
        (lambda: skip_spikes(optax.identity(), window=None), TypeError, "window must be a whole number >= 2, got None"),
        (lambda: skip_spikes(optax.identity(), factor=-1), ValueError, "factor must be finite and >= 0, got -1"),
        (lambda: skip_spikes(optax.identity(), factor=np.nan), ValueError, "factor must be finite and >= 0, got nan"),
        (lambda: skip_spikes(optax.identity(), factor="6"), TypeError, "factor must be a number"),
        (lambda: skip_spikes(optax.identity(), loss=1.0), TypeError, "loss must be True or False, got 1.0"),
        (lambda: skip_spikes(optax.identity(), max_consecutive=0), ValueError, "max_consecutive must be a whole"),
        (lambda: skip_spikes(optax.identity(), axis_name=("i", 1)), TypeError, "axis_name must be None, a string or"),
    ],
)
def test_arguments(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


@pytest.mark.parametrize("guard", [skip_nonfinite, skip_spikes])
def test_updates_and_states(guard):
    tx, params = guard(adamite.adam(0.1)), {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match=re.escape("state must be a SkipState, got tuple")):
        tx.update(params, adamite.adam(0.1).init(params), params)
    with pytest.raises(TypeError, match=re.escape("updates['w'] has dtype int32")):
        tx.update({"w": jnp.ones(3, jnp.int32)}, tx.init(params), params)
    with pytest.raises(ValueError, match=re.escape("updates['w'] has shape (2,)")):
        tx.update({"w": jnp.ones(2)}, tx.init(params), params)


def test_a_state_of_the_other_guard():
    tx = skip_spikes(optax.identity())
    with pytest.raises(TypeError, match=re.escape("state must be one of skip_spikes, with norms of window 128")):
        tx.update(jnp.ones(2), skip_nonfinite(optax.identity()).init(jnp.ones(2)))
    with pytest.raises(TypeError, match=re.escape("state must be one of skip_spikes, with norms of window 128")):
        tx.update(jnp.ones(2), skip_spikes(optax.identity(), window=8).init(jnp.ones(2)))
    with pytest.raises(TypeError, match=re.escape("state must be one of skip_nonfinite, without norms")):
        skip_nonfinite(optax.identity()).update(jnp.ones(2), tx.init(jnp.ones(2)))
