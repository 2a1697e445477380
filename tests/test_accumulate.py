"""Micro-batches: one step for several, equal to one large batch, and what is bad in them dropped and told."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamite
from adamite import AccumulateState, accumulate, skip_nonfinite, skip_spikes
from adamite.sharding import zero1
from bits import assert_same_bits, types
from compilation import compiled

pytestmark = pytest.mark.few(1)

SHAPES = {"w": (16, 256), "b": (5,), "s": ()}


def values(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def run(tx, gradients, params):
    """Parameters and states, from before the first call on."""
    state, update = tx.init(params), jax.jit(tx.update)
    path = [(params, state)]
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append((params, state))
    return path


def mean(gradients):
    return jax.tree.map(lambda *g: sum(g[1:], g[0]) / len(g), *gradients)


OPTIMIZERS = {
    "adamw": lambda: adamite.adamw(optax.linear_schedule(1e-2, 1e-3, 4)),
    "clipped": lambda: adamite.chain(optax.clip_by_global_norm(1.0), adamite.adam(1e-2)),
    "int8": lambda: adamite.adamw(1e-2, moments="int8"),
    "optax": lambda: optax.adamw(1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_as_one_large_batch(optimizer, every):
    tx, gradients = OPTIMIZERS[optimizer](), [values(seed) for seed in range(1, 7)]
    large = [mean(gradients[i : i + every]) for i in range(0, 6, every)]
    params, state = run(accumulate(tx, every), gradients, values(0))[-1]
    expected, inner = run(tx, large, values(0))[-1]
    assert (state.count, state.summed, state.dropped) == (0, 0, 0)
    chex.assert_trees_all_close((params, state.inner), (expected, inner), rtol=1e-5, atol=1e-7)


def test_as_optaxs_multi_steps():
    gradients = [values(seed) for seed in range(1, 10)]
    ours = run(accumulate(adamite.adam(1e-2), 3), gradients, values(0))
    theirs = run(optax.MultiSteps(optax.adam(1e-2), 3), gradients, values(0))
    for (params, _), (expected, _) in zip(ours, theirs, strict=True):
        chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_between_steps_nothing_moves():
    path = run(accumulate(adamite.adamw(1e-2), 3), [values(1), values(2)], values(0))
    for params, state in path[1:]:
        assert_same_bits((params, state.inner), (path[0][0], path[0][1].inner))
    assert (path[2][1].count, path[2][1].summed) == (2, 2)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", SHAPES)
@pytest.mark.parametrize("when", [0, 1, 2, 4])
def test_a_bad_micro_batch_is_dropped_and_told(fault, leaf, when):
    tx, gradients = adamite.adamw(1e-2), [values(seed) for seed in range(1, 7)]
    bad = [*gradients]
    bad[when] = bad[when] | {leaf: bad[when][leaf].at[...].set(fault)}
    path = run(accumulate(tx, 3), bad, values(0))
    assert [int(state.dropped) for _, state in path[1:]] == [int(n >= when) for n in range(6)]
    chex.assert_tree_all_finite(path[-1])
    kept = [mean([g for n, g in enumerate(gradients) if n // 3 == step and n != when]) for step in range(2)]
    chex.assert_trees_all_close(path[-1][0], run(tx, kept, values(0))[-1][0], rtol=1e-5, atol=1e-7)


def test_where_all_are_bad_no_step_is_taken():
    nothing = jax.tree.map(lambda g: g * jnp.nan, values(1))
    path = run(accumulate(adamite.adamw(1e-2), 2), [nothing, nothing, values(1), values(2)], values(0))
    assert_same_bits((path[2][0], path[2][1].inner), (path[0][0], path[0][1].inner))
    assert (path[2][1].count, path[2][1].dropped) == (0, 2)
    assert path[4][1].inner[0].count == 1


def test_a_sum_that_overflows_is_left_out_by_the_guard_inside_and_gone_after():
    huge = jax.tree.map(lambda g: jnp.full_like(g, 1e30), values(1))
    path = run(accumulate(skip_nonfinite(adamite.adamw(1e-2)), 2), [values(1), huge, values(2), values(3)], values(0))
    assert path[2][1].inner.skipped == 1
    assert_same_bits(path[2][1].inner.inner, path[0][1].inner.inner)
    expected = run(adamite.adamw(1e-2), [mean([values(2), values(3)])], values(0))[-1][0]
    chex.assert_trees_all_close(path[4][0], expected, rtol=1e-6)


def test_spikes_of_the_mean():
    gradients = [values(seed) for seed in range(1, 9)] + [jax.tree.map(lambda g: 1e4 * g, values(9)), values(10)]
    state = run(accumulate(skip_spikes(adamite.adam(1e-2), window=4), 2), gradients, values(0))[-1][1]
    assert (state.inner.skipped, state.dropped) == (1, 0)


@pytest.mark.more
def test_low_precision_weights_take_the_mean_in_float32():
    tx = accumulate(adamite.adamw(1e-3, moments="int8", rounding="residual8"), 2)
    params = values(0, jnp.bfloat16)
    path = run(tx, [values(seed, jnp.bfloat16) for seed in range(1, 5)], params)
    state = path[-1][1]
    assert {x.dtype.name for x in jax.tree.leaves(state.gradients)} == {"float32"}
    wide = [
        mean([jax.tree.map(lambda x: x.astype(jnp.float32), values(i + n, jnp.bfloat16)) for n in (0, 1)])
        for i in (1, 3)
    ]
    expected = run(adamite.adamw(1e-3, moments="int8", rounding="residual8"), wide, params)[-1]
    assert_same_bits((path[-1][0], state.inner), expected)


@pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_the_sums_dtype(dtype, expected):
    tx = accumulate(adamite.adam(1e-2), 2, dtype=dtype)
    params = values(0, jnp.bfloat16)
    path = run(tx, [values(1, jnp.bfloat16), values(2, jnp.bfloat16)], params)
    for _, state in path:
        assert {x.dtype.name for x in jax.tree.leaves(state.gradients)} == {expected}
    assert types(path[-1][1]) == types(path[0][1])


def test_one_program_scanned_and_donated():
    tx, params = accumulate(skip_nonfinite(adamite.adamw(1e-2)), 2), values(0)
    step = jax.jit(lambda g, state, params: tx.update(g, state, params), donate_argnums=1)
    state, gradients = tx.init(params), [values(seed) for seed in range(4)]
    expected, before = types(state), compiled()
    for g in gradients:
        _, state = step(g, state, params)
        assert types(state) == expected
    assert compiled() - before == 1
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s, params)[1], None), tx.init(params), stacked)
    assert state.inner.inner[0].count == 2


def test_eager_is_jitted():
    tx, params = accumulate(adamite.adamw(1e-2), 2), values(0)
    state = tx.init(params)
    for g in [values(1), values(2)]:
        updates, state = tx.update(g, state, params)
    expected = run(tx, [values(1), values(2)], params)[-1]
    chex.assert_trees_all_close((optax.apply_updates(params, updates), state), expected, rtol=1e-5, atol=1e-7)


def test_absent_and_complex_gradients():
    tx = accumulate(adamite.adam(1e-2), 2, dtype="bfloat16")
    params = {"z": jnp.ones(2, jnp.complex64), "none": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)({"z": jnp.full(2, 1 + 1j), "none": None}, state, params)
    assert updates["none"] is None
    assert (updates["z"].dtype, state.gradients["z"].dtype) == (jnp.complex64, jnp.complex64)
    assert state.inner[0].count == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_spread_by_zero1_as_on_one_device(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx, gradients = accumulate(adamite.adamw(1e-2), 2), [values(seed) for seed in range(1, 5)]
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    spread = zero1(tx, mesh)
    state, update = spread.init(place(values(0))), jax.jit(spread.update)
    one, one_update = tx.init(values(0)), jax.jit(tx.update)
    for g in gradients:
        _, state = update(place(g), state, place(values(0)))
        _, one = one_update(g, one, values(0))
    chex.assert_trees_all_close(state, one, rtol=1e-6)
    assert state.gradients["w"].addressable_shards[0].data.shape == (2, 256)


def test_devices_drop_as_one():
    tx, params = accumulate(adamite.adam(0.1), 2, axis_name="i"), jnp.ones(4)
    replicas = jax.tree.map(lambda x: jnp.stack([x] * 8), (tx.init(params), params))
    _, state = jax.pmap(tx.update, axis_name="i")(jnp.ones((8, 4)).at[5, 1].set(jnp.nan), *replicas)
    np.testing.assert_array_equal(state.dropped, 1)
    np.testing.assert_array_equal(state.gradients, 0)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: accumulate(None, 2), TypeError, "tx must be a gradient transformation, got None"),
        (lambda: accumulate(optax.identity(), 0), ValueError, "every must be a whole number >= 1, got 0"),
        (lambda: accumulate(optax.identity(), 2.0), TypeError, "every must be a whole number >= 1, got 2.0"),
        (lambda: accumulate(optax.identity(), True), TypeError, "every must be a whole number >= 1, got True"),
        (lambda: accumulate(optax.identity(), 2, dtype="int8"), ValueError, "dtype must be None or a floating dtype"),
        (lambda: accumulate(optax.identity(), 2, dtype="x"), TypeError, "dtype must be None or a floating dtype"),
        (lambda: accumulate(optax.identity(), 2, axis_name=1), TypeError, "axis_name must be None, a string or a"),
    ],
)
def test_arguments(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


def test_updates_and_states():
    tx, params = accumulate(adamite.adam(0.1), 2), {"w": jnp.ones(3)}
    state = tx.init(params)
    assert isinstance(state, AccumulateState)
    with pytest.raises(TypeError, match="state must be an AccumulateState, got tuple"):
        tx.update(params, adamite.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match=re.escape("updates['w'] has shape (2,), but gradients['w'] has shape (3,)")):
        tx.update({"w": jnp.ones(2)}, state, params)
    with pytest.raises(TypeError, match=re.escape("updates['w'] has dtype int32")):
        tx.update({"w": jnp.ones(3, jnp.int32)}, state, params)
    with pytest.raises(TypeError, match=re.escape("params['w'] has dtype int32")):
        tx.init({"w": jnp.ones(3, jnp.int32)})
