"""Weights of 16 bits land where the rounding says, exactly; and what it says is right, exactly or on average."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import adamite
from adamite.core.rounding_part import RoundingState
from adamite.random_bits import element_index, fold, random_bits
from adamite.rounding import Nearest, Residual8, Residual16, Stochastic, nearest, spacing
from bits import assert_same_bits

pytestmark = pytest.mark.few(2)

DTYPES = [jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)]
RESIDUALS = [
    (Residual8(), DTYPES[0]),
    (Residual8(), DTYPES[1]),
    (Residual16(), DTYPES[0]),
]
ALL = [*RESIDUALS, *((how, dtype) for how in (Nearest(), Stochastic()) for dtype in DTYPES)]
DRAWS = 100_000
COARSE = 2.0**-110  # below, bfloat16's own grid is finer than the rounding's, which float32 still computes exactly
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each = pytest.mark.parametrize(("how", "dtype"), ALL, ids=str)
with_residual = pytest.mark.parametrize(("how", "dtype"), RESIDUALS, ids=str)

NORMAL = float(jnp.finfo(jnp.float32).smallest_normal)


def bits_of(shape, seed=0, step=1):
    return random_bits(fold(seed, step), element_index(shape))


def finite(dtype):
    """Float32 arrays of any magnitude in the range of that dtype, and beyond what it tells from 0."""
    largest = float(jnp.finfo(dtype).max)
    numbers = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return arrays(np.float32, (64,), elements=numbers, fill=st.nothing())


def all_numbers(dtype):
    """Every finite number of 16 bits."""
    x = np.arange(2**16).astype(np.uint16).view(dtype)
    return x[np.isfinite(x.astype(np.float32))]


def round_to_nearest(x, dtype):
    """By another library, in its own arithmetic."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16 if dtype == DTYPES[0] else np.float16)


class TestNearest:
    @of_dtype
    @given(data=st.data())
    def test_is_the_conversion_of_the_dtype(self, dtype, data):
        x = data.draw(finite(dtype))
        found = np.asarray(jax.jit(nearest, static_argnums=1)(x, dtype))
        same = (found == round_to_nearest(x, dtype)) | (np.abs(x) < COARSE)
        assert same.all()
        assert (np.abs(found - x) <= COARSE * 2.0**-9)[np.abs(x) < COARSE].all()

    @of_dtype
    def test_ties_are_to_even(self, dtype):
        """Half way between any two neighbours."""
        x = np.unique(all_numbers(dtype).astype(np.float32))
        between = x[:-1] + np.diff(x) / 2
        between = between[np.abs(between) >= COARSE]
        np.testing.assert_array_equal(nearest(jnp.asarray(between), dtype), round_to_nearest(between, dtype))

    @of_dtype
    def test_what_is_past_the_largest_is_the_largest_and_infinity_stays(self, dtype):
        largest = float(jnp.finfo(dtype).max)
        x = jnp.array([3e38, -3.4e38, jnp.inf, -jnp.inf, jnp.nan])
        expected = [min(float(nearest(x, dtype)[0]), largest), -largest, np.inf, -np.inf, np.nan]
        np.testing.assert_array_equal(nearest(x, dtype), expected)

    @of_dtype
    def test_spacing(self, dtype):
        x = np.sort(all_numbers(dtype).astype(np.float32))
        x = x[(x >= float(jnp.finfo(dtype).smallest_normal)) & (x >= COARSE)]
        np.testing.assert_array_equal(spacing(jnp.asarray(x[:-1]), dtype), np.diff(x))


class TestStochastic:
    @of_dtype
    def test_the_mean_is_the_number(self, dtype):
        """One draw is off by at most a spacing, the mean of so many by 1/632 of one, root mean square."""
        x = np.array([1.0001, -0.6, 0.999, 0.51, 3.3e-5, -1e-7, 1234.5], np.float32)
        draw = jax.jit(jax.vmap(lambda x: Stochastic().round(jnp.full(DRAWS, x), dtype, lambda: bits_of((DRAWS,)))[0]))
        means = np.asarray(draw(x), np.float64).mean(1)
        assert (np.abs(means - x) / np.asarray(spacing(jnp.asarray(x), dtype))).max() < 5 / 632
        assert np.abs(means - x)[:4].max() < 3e-5

    @of_dtype
    def test_over_all_bits_the_mean_is_the_number_exactly(self, dtype):
        """As many draws go up as the number has come of the way: none is lost for want of random bits."""
        x = jnp.float32([1 + 2.0**-23, -0.6, 3.3e-3, 1234.5])
        every = jnp.arange(2**16, dtype=jnp.uint32) << 16
        draw = jax.jit(jax.vmap(lambda x: Stochastic().round(jnp.full(every.shape, x), dtype, lambda: every)[0]))
        np.testing.assert_array_equal(np.asarray(draw(x), np.float64).mean(1), x)

    @of_dtype
    @given(data=st.data())
    def test_is_one_of_the_two_neighbours(self, dtype, data):
        x = data.draw(finite(dtype))
        found, none = Stochastic().round(jnp.asarray(x), dtype, lambda: bits_of(x.shape, data.draw(st.integers(0, 9))))
        assert none is None
        np.testing.assert_array_equal(found, round_to_nearest(found, dtype))
        s = np.maximum(spacing(jnp.asarray(x), dtype), np.spacing(np.abs(x)))
        assert (np.abs(np.asarray(found, np.float64) - x) < s).all()

    @of_dtype
    @pytest.mark.parametrize("bits", [0, 2**32 - 1])
    def test_a_number_of_the_dtype_stays_itself(self, dtype, bits):
        x = all_numbers(dtype).astype(np.float32)
        x = x[(np.abs(x) >= COARSE) | (x == 0)]
        found, _ = Stochastic().round(jnp.asarray(x), dtype, lambda: jnp.full(x.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(found, x)


class TestResidual16:
    @given(st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64))
    def test_two_halves_are_the_float32(self, bits):
        x = np.array(bits, np.uint32).view(np.float32)
        x[~((np.abs(x) <= float(jnp.finfo(jnp.bfloat16).max)) & (np.abs(x) >= NORMAL))] = 0  # they would be flushed
        p, residual = Residual16().round(jnp.asarray(x), DTYPES[0], lambda: None)
        assert residual.dtype == jnp.int16
        found = Residual16().weights(p.astype(jnp.bfloat16), residual)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), x.view(np.uint32))
        assert (np.abs(p - x) <= np.abs(round_to_nearest(x, DTYPES[0]).astype(np.float32) - x)).all()


class TestResidual8:
    @of_dtype
    @given(data=st.data())
    def test_within_a_256th_of_the_spacing(self, dtype, data):
        x = data.draw(finite(dtype))
        p, residual = Residual8().round(jnp.asarray(x), dtype, lambda: bits_of(x.shape))
        assert residual.dtype == jnp.int8
        found = np.asarray(Residual8().weights(p.astype(dtype), residual), np.float64)
        unit = np.asarray(spacing(p, dtype), np.float64) / 256
        fits = np.abs(x) < float(jnp.finfo(dtype).max) * (1 - 2.0**-9)
        assert (np.abs(found - x) <= unit)[fits].all()
        normal = fits & (np.abs(x) >= max(float(jnp.finfo(dtype).smallest_normal), COARSE))
        assert (np.abs(found - x) <= np.abs(x) * 2.0 ** -(jnp.finfo(dtype).nmant + 8))[normal].all()

    @of_dtype
    def test_the_mean_is_the_number(self, dtype):
        x = np.array([1.00001, -0.6, 0.9999999, 0.50001, 3.3e-3, 1234.5678], np.float32)

        def draw(x):
            p, residual = Residual8().round(jnp.full(DRAWS, x), dtype, lambda: bits_of((DRAWS,)))
            return Residual8().weights(p.astype(dtype), residual)

        means = np.asarray(jax.jit(jax.vmap(draw))(x), np.float64).mean(1)
        unit = np.asarray(spacing(jnp.asarray(x), dtype), np.float64) / 256
        assert (np.abs(means - x) / unit).max() < 5 / 632

    @of_dtype
    def test_256_counts_to_a_spacing_and_none_twice(self, dtype):
        p = all_numbers(dtype)
        p = p[(p.astype(np.float32) >= 2.0**-10) & (p.astype(np.float32) < 2.0)]
        counts = np.arange(-128, 128, dtype=np.int8)
        at = np.asarray(Residual8().weights(jnp.asarray(p)[:, None], jnp.asarray(counts)), np.float64)
        assert (np.diff(np.unique(at)) > 0).all()
        back, residual = Residual8().round(jnp.asarray(at, jnp.float32), dtype, lambda: bits_of(at.shape))
        np.testing.assert_array_equal(Residual8().weights(back.astype(dtype), residual), at)


@st.composite
def steps(draw, dtype):
    """Weights, updates and counts beside the weights: updates from far below a spacing to far above the weight."""
    numbers = all_numbers(dtype)
    at = draw(st.lists(st.integers(0, numbers.size - 1), min_size=64, max_size=64))
    size = draw(arrays(np.float32, (64,), elements=st.floats(-20, 3, width=32)))
    sign = draw(arrays(np.int8, (64,), elements=st.sampled_from([-1, 1])))
    p = numbers[at].astype(np.float64)
    p = np.where(np.abs(p) < 2.0**-60, 0, p)
    u = sign * np.where(p == 0, 1, np.abs(p)) * 2.0**size
    largest = float(jnp.finfo(dtype).max) / 4
    p, u = np.clip(p, -largest, largest), np.clip(u, -largest, largest)
    return jnp.asarray(p, dtype), jnp.asarray(u, jnp.float32)


class TestLanding:
    """`optax.apply_updates` gives the weight that the rounding chose, to the bit."""

    @each
    @settings(max_examples=15)
    @given(data=st.data())
    def test_from_anywhere_to_anywhere(self, how, dtype, data):
        p, u = data.draw(steps(dtype))
        tx = adamite.round_weights(how)
        state = tx.init(p)
        if how.residual_dtype:
            info = jnp.iinfo(how.residual_dtype)
            residual = data.draw(arrays(info.dtype, p.shape, elements=st.integers(int(info.min), int(info.max))))
            state = state._replace(residual=jnp.where(p == 0, 0, residual))
        key = None if how.seed is None else fold(fold(how.seed, 1), 0)
        theta = how.weights(p, getattr(state, "residual", None)) + u
        target, residual = how.round(theta, dtype, lambda: random_bits(key, element_index(p.shape)))
        updates, after = tx.update(u, state, p)
        landed = optax.apply_updates(p, updates)
        assert landed.dtype == dtype
        assert updates.dtype == jnp.float32
        missed = np.asarray(landed, np.float32) != np.asarray(target)
        # Across 0 from just below a power of two, to less than p / 2^15, p + u misses the target by its own rounding.
        far = np.abs(np.asarray(p, np.float32)[missed])
        assert (np.abs(np.asarray(target)[missed]) < far / 2.0**15).all()
        assert (np.abs(np.asarray(landed, np.float32) - np.asarray(target))[missed] < far * 2.0**-24).all()
        if how.residual_dtype:
            np.testing.assert_array_equal(after.residual, np.where(missed, 0, residual))

    def test_where_the_sum_misses_there_is_no_residual(self):
        """From just below 1 to just below 0. The residual of a weight that is not there would be worse than none."""
        p, residual = jnp.ones(64, jnp.bfloat16), -jnp.arange(64, dtype=jnp.int16)
        u = jnp.full(64, -1 - 2.0**-23)
        tx = adamite.round_weights("residual16")
        updates, after = tx.update(u, tx.init(p)._replace(residual=residual), p)
        target, _ = Residual16().round(Residual16().weights(p, residual) + u, DTYPES[0], lambda: None)
        missed = optax.apply_updates(p, updates).astype(jnp.float32) != target
        assert 0 < missed.sum() < 64
        np.testing.assert_array_equal(after.residual, 0)

    @each
    def test_infinities_and_nans_land_as_they_are(self, how, dtype):
        p, u = jnp.ones(4, dtype), jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0])
        tx = adamite.round_weights(how)
        updates, state = tx.update(u, tx.init(p), p)
        landed = optax.apply_updates(p, updates).astype(jnp.float32)
        np.testing.assert_array_equal(landed, [np.inf, -np.inf, np.nan, 1])
        if how.residual_dtype:
            np.testing.assert_array_equal(state.residual, 0)


def gradients_of(steps, dtype, shape=(40, 130)):
    """The same for everyone, whatever the weights are: rows of different size, and some zeros."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((steps, *shape)) * 10.0 ** -np.linspace(0, 4, shape[0])[:, None]
    return jnp.asarray(g * (rng.uniform(size=g.shape) < 0.9) + 1e-3, dtype)


def run(tx, params, gradients):
    """The parameters and the state after all steps, and the full weights at each.

    The sum is a program of its own: in one with `update`, a compiler may fuse the last product with it. XLA makes the
    updates, for kernels round some operations otherwise.
    """
    update, apply = jax.jit(functools.partial(tx.update, engine="xla")), jax.jit(optax.apply_updates)
    state, path = tx.init(params), []
    for g in gradients:
        updates, state = update(g, state, params)
        params = apply(params, updates)
        path.append(np.asarray(adamite.full_weights(params, state)))
    return params, state, np.stack(path)


START = jnp.asarray(np.random.default_rng(1).standard_normal((40, 130)), jnp.bfloat16)
RECIPES = {
    "adam": lambda **kw: adamite.adam(3e-4, **kw),
    "adamw, schedule": lambda **kw: adamite.adamw(optax.cosine_decay_schedule(1e-3, 1000), weight_decay=0.1, **kw),
    "momentum": lambda **kw: adamite.sgd(1e-2, momentum=0.9, **kw),
    "lion": lambda **kw: adamite.lion(1e-4, **kw),
    "int8": lambda **kw: adamite.adamw(1e-3, moments="int8", **kw),
}


SLOW = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("adam", "momentum", "lion")]


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", ["adamw, schedule", "int8", *SLOW])
def test_residual16_is_the_float32_weight_for_a_thousand_steps(recipe):
    gradients = gradients_of(1000, jnp.float32)
    make = RECIPES[recipe]
    params, state, lean = run(make(rounding="residual16"), START, gradients)
    _, plain_state, full = run(make(), START.astype(jnp.float32), gradients)
    assert params.dtype == jnp.bfloat16
    assert_same_bits(lean, full)
    assert_same_bits(state[:-1], plain_state)
    np.testing.assert_array_equal(params, jnp.asarray(full[-1]).astype(jnp.bfloat16))


def test_updates_stay_float32_until_the_rounding():
    """Gradients of 16 bits, with decay: each step is the float32 one, not one rounded on the way."""
    gradients = gradients_of(50, jnp.bfloat16)
    parts = adamite.scale_by_adam(), adamite.add_decayed_weights(1e-4), adamite.scale_by_learning_rate(1e-3)
    clip = optax.clip_by_global_norm(1.0)

    def path(*parts):
        return run(adamite.chain(*parts), START, gradients)[2]

    def full_path(*parts):
        """Float32 weights take their updates from `round_weights` as they are, whatever the gradients."""
        return run(adamite.chain(*parts, rounding="nearest"), START.astype(jnp.float32), gradients)[2]

    rounding = adamite.round_weights("residual16")
    assert_same_bits(path(*parts, rounding), full_path(*parts))
    # XLA multiplies the clip's factor with those after it beforehand, where it is in one program with them.
    np.testing.assert_allclose(path(clip, *parts, rounding), full_path(clip, *parts), rtol=5e-7, atol=1e-8)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual8", "residual16"])
def test_wide_weights_take_their_updates_as_they_are(rounding):
    params = {"wide": jnp.ones(8), "complex": jnp.ones(8, jnp.complex64), "short": jnp.ones(8, jnp.bfloat16)}
    gradients = jax.tree.map(lambda p: p / 3, params)
    make = adamite.adam
    lean, plain = make(1e-3, rounding=rounding), make(1e-3)
    updates, state = lean.update(gradients, lean.init(params), params)
    expected, _ = plain.update(gradients, plain.init(params), params)
    for name in ("wide", "complex"):
        assert_same_bits(updates[name], expected[name])
        full = adamite.full_weights(optax.apply_updates(params, updates), state)[name]
        assert_same_bits(full, params[name] + expected[name])
    if isinstance(state[-1], RoundingState) and state[-1].residual:
        assert state[-1].residual["wide"].shape == state[-1].residual["complex"].shape == (1,)


def test_nearest_is_what_apply_updates_does_but_for_the_update_in_float32():
    tx, params = adamite.round_weights("nearest"), START
    u = jnp.linspace(-1e-2, 1e-2, params.size).reshape(params.shape)
    updates, state = tx.update(u, tx.init(params), params)
    assert state == optax.EmptyState()
    assert_same_bits(optax.apply_updates(params, updates), (params.astype(jnp.float32) + u).astype(jnp.bfloat16))


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [Stochastic, Residual8])
def test_seeds_give_other_bits(how):
    def after(seed):
        tx = adamite.adam(1e-3, rounding=how(seed))
        return run(tx, START, gradients_of(2, jnp.float32))[:2]

    assert_same_bits(after(5), after(5))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after(5), after(6))), strict=True))


class TestErrors:
    def test_residual16_is_for_bfloat16(self):
        params = {"layers": [jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float16)]}
        with pytest.raises(ValueError, match=r"^params\['layers'\]\[1\] is float16; residual16 is for bfloat16, "):
            adamite.adam(1e-3, rounding="residual16").init(params)

    @pytest.mark.parametrize("rounding", ["up", "Residual8", ""])
    def test_unknown(self, rounding):
        says = f"rounding must be one of 'nearest', 'stochastic', 'residual8', 'residual16', got {rounding!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
            adamite.round_weights(rounding)

    @pytest.mark.parametrize("rounding", [8, None, True, Residual8, ("residual8",)])
    def test_the_wrong_kind(self, rounding):
        with pytest.raises(TypeError, match=r"^rounding must be one of "):
            adamite.round_weights(rounding)

    @pytest.mark.parametrize("how", [Stochastic, Residual8])
    @pytest.mark.parametrize("seed", [None, 0.5, "0", True])
    def test_seeds_are_whole_numbers(self, how, seed):
        with pytest.raises(TypeError, match=r"^seed must be a whole number, got "):
            how(seed)

    def test_nothing_comes_after_it(self):
        with pytest.raises(
            ValueError, match=r"^parts\[0\] rounds weights.*round_weights must be the last part of a chain"
        ):
            adamite.chain(adamite.round_weights("stochastic"), adamite.scale_by_learning_rate(1e-3))
        with pytest.raises(
            ValueError, match=r"^parts\[0\] rounds weights.*round_weights must be the last part of a chain"
        ):
            adamite.chain(adamite.adam(1e-3, rounding="stochastic"), optax.scale(0.5))

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic", "residual8", "residual16"])
    def test_params_are_needed(self, rounding):
        tx = adamite.adam(1e-3, rounding=rounding)
        with pytest.raises(ValueError, match=r"^weights cannot be rounded without params"):
            tx.update(START, tx.init(START))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_full_weights_in_the_program_that_makes_them_are_those_that_it_stores(self, dtype):
        """XLA would give them with the digits that 16 bits do not hold."""
        rng = np.random.default_rng(0)
        params, g = (jnp.asarray(rng.standard_normal((64, 256)) * scale, dtype) for scale in (1e-4, 1.0))
        tx = adamite.adamw(1e-5)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return params, adamite.full_weights(params, state)

        stored, full = step(params, tx.init(params))
        assert_same_bits(full, stored.astype(jnp.float32))

    def test_full_weights_of_parameters_in_groups(self):
        params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(3)}
        groups = {name: adamite.sgd(rate, rounding="residual16") for name, rate in (("a", 1e-3), ("b", 1e-4))}
        tx = optax.partition(groups | {"c": optax.set_to_zero()}, {name: name for name in params})
        g = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(g, tx.init(params), params)
        full = adamite.full_weights(optax.apply_updates(params, updates), state)
        for name, rate in (("a", 1e-3), ("b", 1e-4), ("c", 0.0)):
            np.testing.assert_allclose(full[name], 1 - rate, rtol=1e-7)
        with pytest.raises(
            ValueError, match=r"^params and the residual in state differ in structure: the residual\['b'\] has no"
        ):
            adamite.full_weights({"a": params["a"]}, state)

    def test_full_weights_of_two_roundings(self):
        tx = adamite.round_weights("residual8")
        with pytest.raises(ValueError, match=r"^state must have one residual of params, got two"):
            adamite.full_weights(START, (tx.init(START), tx.init(START)))

    def test_a_state_of_another_optimizer(self):
        tx = adamite.adam(1e-3, rounding="residual8")
        with pytest.raises(TypeError, match=r"^state must be a tuple of the 3 parts' states, got 2"):
            tx.update(START, adamite.adam(1e-3).init(START), START)
