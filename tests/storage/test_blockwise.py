"""Moments in blocks: how far a stored number may be from the one that was given, and what never changes."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adamite
from adamite.random_bits import element_index, fold, random_bits
from adamite.storage import Blockwise, Dense
from reference import codes as reference

pytestmark = pytest.mark.few(2)

MEAN = Blockwise(smallest=1, seed=None)
ROOT = Blockwise(smallest=1, unsigned=True)
FLOAT8 = Blockwise(smallest=1, unsigned=True, float8=True)
TABLES = {MEAN: reference.cubic_signed(), ROOT: reference.cubic_unsigned(), FLOAT8: reference.ue5m3()}
NAMES = {MEAN: "mean", ROOT: "root", FLOAT8: "float8"}
LEAVES = [
    ((1,), 32),
    ((70,), 32),
    ((3, 1), 64),
    ((2, 3, 129), 128),
    ((300,), 256),
    ((2, 1, 2, 512), 512),
    ((1025,), 1024),
]
ULP, NORMAL = 2.0**-23, float(jnp.finfo(jnp.float32).smallest_normal)
each = pytest.mark.parametrize("storage", TABLES, ids=NAMES.get)


def bits_for(shape, seed=0):
    return lambda: random_bits(fold(seed, 1), element_index(shape))


@functools.cache
def jitted(storage):
    """``x, bits -> stored, decoded``, from a fresh state."""

    def run(x, bits):
        stored = storage.encode(x, storage.fresh(x), lambda: bits)
        return stored, storage.decode(stored)

    return jax.jit(run)


def stored_and_decoded(storage, x, seed=0):
    stored, decoded = jitted(storage)(x, bits_for(x.shape, seed)())
    return stored, np.asarray(decoded)


def spread(scales, block, n):
    return np.repeat(np.asarray(scales, np.float64), block, axis=-1)[..., :n]


def blocks_of(x, block):
    """(..., n) -> (blocks, block), the last one filled up with zeros."""
    ragged = -x.shape[-1] % block
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, ragged)]).reshape(-1, block)


@st.composite
def arrays(draw, shape, block, unsigned):
    """Of any magnitude from the subnormal numbers to 1e30, smooth or rough."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape)
    kind = draw(st.sampled_from(["normal", "constant", "outlier", "decades", "holes", "zeros"]))
    if kind == "constant":
        x = np.full(shape, draw(st.sampled_from([1.0, -1.0, 0.3])))
    elif kind == "outlier":
        x[..., :: min(block, shape[-1])] *= 1e6
    elif kind == "decades":
        x *= 10 ** rng.uniform(-8, 0, shape)
    elif kind == "holes":
        x *= rng.uniform(size=shape) < 0.5
    elif kind == "zeros":
        x *= 0
    x *= 10.0 ** draw(st.floats(-44, 30))
    return (np.abs(x) if unsigned else x).astype(np.float32)


def furthest(storage, z):
    """How far a stored number may be from each z in [-1, 1], by the table: below, and above."""
    if storage is MEAN:
        far = reference.nearest(z.ravel(), TABLES[storage])[1].reshape(z.shape)
        return -far, far
    root = np.sqrt(z) if storage is ROOT else z
    below, above = reference.neighbours(root, TABLES[storage])
    least = TABLES[storage][2 if storage is ROOT else 1]  # nothing above 0 becomes 0
    below, above = (np.where(z > 0, np.maximum(x, least), x) for x in (below, above))
    return (below**2 - z, above**2 - z) if storage is ROOT else (below - z, above - z)


@each
@pytest.mark.parametrize(("shape", "block"), LEAVES)
@given(data=st.data())
def test_stored_numbers_are_neighbours_in_their_block(storage, shape, block, data):
    x = data.draw(arrays(shape, block, storage.unsigned))
    own = dataclasses.replace(storage, block=block)
    stored, decoded = stored_and_decoded(own, x, data.draw(st.integers(0, 9)))
    scales = np.asarray(stored.scales)
    x = np.where(np.abs(x) < NORMAL, 0, x)  # XLA reads a subnormal number as 0

    assert scales.shape == (*shape[:-1], math.ceil(shape[-1] / block))
    its_blocks, largest = blocks_of(x, block), scales.ravel()
    empty = ~its_blocks.any(1)
    np.testing.assert_array_equal(largest[empty], 1)
    np.testing.assert_array_equal(largest[~empty], np.abs(its_blocks[~empty]).max(1))

    wide = spread(scales, block, shape[-1])
    np.testing.assert_array_equal(decoded[np.abs(x) == wide], x[np.abs(x) == wide])
    down, up = furthest(storage, x / wide)
    slack = 16 * ULP * (np.abs(x) + np.abs(decoded)) + NORMAL
    error = decoded - np.float64(x)
    assert (error >= down * wide - slack).all()
    assert (error <= up * wide + slack).all()
    if storage.unsigned:
        assert (np.asarray(stored.codes)[x / wide >= NORMAL] != 0).all()
    np.testing.assert_array_equal(decoded[x == 0], 0)


@each
@pytest.mark.parametrize(("shape", "block"), [((70,), 32), ((2, 3, 129), 128)])
@pytest.mark.parametrize("bits", [0, 2**32 - 1])
@given(data=st.data())
def test_a_stored_number_stays_itself(storage, shape, block, bits, data):
    """A state that is decoded and encoded again does not drift, whatever the random bits are."""
    own = dataclasses.replace(storage, block=block)
    x = data.draw(arrays(shape, block, storage.unsigned))
    stored, decoded = stored_and_decoded(own, x)
    again, twice = jitted(own)(decoded, jnp.full(shape, bits, jnp.uint32))
    np.testing.assert_array_equal(again.scales, stored.scales)
    normal = spread(stored.scales, block, shape[-1]) > 1e-24  # else small codes decode to subnormal numbers
    np.testing.assert_array_equal(np.asarray(again.codes)[normal], np.asarray(stored.codes)[normal])
    np.testing.assert_array_equal(np.asarray(twice)[normal], decoded[normal])


@each
def test_stochastic_rounding_is_right_on_average(storage):
    """Of moments >= 0 the code's value: the root, for the root. A mean is rounded to the nearest, and is not."""
    rng, draws = np.random.default_rng(3), 100_000
    x = np.abs(rng.standard_normal(64)).astype(np.float32)
    x[0] = 4.0
    own = dataclasses.replace(storage, block=64)
    stored, decoded = stored_and_decoded(own, np.tile(x, (draws, 1)))
    values = np.sqrt(decoded / 4) if storage is ROOT else decoded / 4
    exact = np.sqrt(np.float64(x) / 4) if storage is ROOT else x / np.float64(4)
    below, above = reference.neighbours(exact, TABLES[storage])
    off = np.abs(values.mean(0, dtype=np.float64) - exact) / np.maximum(above - below, 1e-9)
    if storage is MEAN:
        assert (np.asarray(stored.codes) == np.asarray(stored.codes)[0]).all()
        assert off.max() > 0.3
    else:
        assert off.max() < 2.5 / math.sqrt(draws) + 2**-13  # five standard deviations


@pytest.mark.parametrize("float8", [False, True])
def test_without_a_seed_all_is_rounded_to_the_nearest(float8):
    storage = Blockwise(smallest=1, unsigned=True, float8=float8, seed=None)
    x = np.random.default_rng(0).uniform(size=(3, 300)).astype(np.float32)
    stored, decoded = jax.jit(lambda x: (y := storage.encode(x, storage.fresh(x), None), storage.decode(y)))(x)
    table = TABLES[FLOAT8 if float8 else ROOT]
    z = x / spread(stored.scales, 256, 300)
    far = reference.nearest((z if float8 else np.sqrt(z)).ravel(), table)[1].reshape(x.shape)
    z_hat = decoded / spread(stored.scales, 256, 300)
    assert (np.abs((z_hat if float8 else np.sqrt(z_hat)) - (z if float8 else np.sqrt(z))) <= far + 8 * ULP).all()


@pytest.mark.parametrize(
    ("storage", "bad"),
    [(MEAN, -np.inf), *itertools.product(TABLES, (np.nan, np.inf))],
    ids=lambda x: NAMES[x] if x in NAMES else str(x),
)
def test_nan_and_infinity_spoil_their_own_block_and_no_other(storage, bad):
    own = dataclasses.replace(storage, block=32)
    x = np.abs(np.random.default_rng(0).standard_normal((2, 70))).astype(np.float32)
    (good, clean), spoilt = stored_and_decoded(own, x), x.copy()
    spoilt[0, 40] = bad
    stored, decoded = stored_and_decoded(own, spoilt)
    own_block = np.zeros_like(x, bool)
    own_block[0, 32:64] = True
    np.testing.assert_array_equal(~np.isfinite(decoded), own_block)
    assert np.isnan(np.delete(decoded[own_block], 8)).all()
    np.testing.assert_array_equal(decoded[~own_block], clean[~own_block])
    np.testing.assert_array_equal(np.asarray(stored.codes)[~own_block], np.asarray(good.codes)[~own_block])
    # It stays, as in float32: a state does not forget it silently.
    _, later = stored_and_decoded(own, 0.9 * decoded + 0.1 * x)
    np.testing.assert_array_equal(np.isnan(later), own_block)


@each
@pytest.mark.parametrize("param", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1,), (300,), (4, 256), (2, 3, 257), (3, 1)])
def test_types_are_a_fixed_point(storage, param, shape):
    leaf = jax.ShapeDtypeStruct(shape, param)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    fresh = jax.eval_shape(storage.fresh, leaf)
    encoded = jax.eval_shape(lambda x, s: storage.encode(x, s, bits_for(shape)), x, fresh)
    assert jax.tree.structure(fresh) == jax.tree.structure(encoded)
    for a, b in zip(fresh, encoded, strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    assert (fresh.codes.shape, fresh.scales.shape) == (shape, (*shape[:-1], math.ceil(shape[-1] / 256)))
    assert (fresh.codes.dtype.name, fresh.scales.dtype.name) == ("uint8" if storage is ROOT else "int8", "float32")
    decoded = jax.eval_shape(storage.decode, fresh)
    assert (decoded.shape, decoded.dtype.name) == (shape, "float32")


@each
@pytest.mark.parametrize("initial", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("smallest", [1, 4096])
def test_the_initial_value_is_exact(storage, initial, smallest):
    own = dataclasses.replace(storage, smallest=smallest).like(Dense(unsigned=storage.unsigned, initial=initial))
    fresh = own.fresh(jax.ShapeDtypeStruct((2, 300), jnp.bfloat16))
    np.testing.assert_array_equal(own.decode(fresh), np.full((2, 300), initial, np.float32))
    assert own.decode(fresh).dtype == jnp.float32


class TestSmallLeaves:
    @each
    @pytest.mark.parametrize(("shape", "small"), [((4095,), True), ((4096,), False), ((15, 273), True), ((), True)])
    def test_fewer_than_4096_elements_stay_float32(self, storage, shape, small):
        own = dataclasses.replace(storage, smallest=4096)
        fresh = own.fresh(jnp.ones(shape, jnp.bfloat16))
        assert (fresh.codes.dtype == jnp.float32) == small
        assert fresh.codes.shape == shape
        if small:
            np.testing.assert_array_equal(fresh.scales, np.ones((1,) * len(shape)))
            x = jnp.full(shape, 1 / 3, jnp.float32)
            encoded = own.encode(x, fresh, bits_for(shape))
            np.testing.assert_array_equal(own.decode(encoded), x)
            np.testing.assert_array_equal(encoded.scales, fresh.scales)

    def test_small_complex_leaves_stay_complex(self):
        tx, params = adamite.scale_by_adam(moments="int8"), jnp.array([1j, 2.0])
        updates, state = jax.jit(tx.update)(params, tx.init(params))
        assert (state.mu.codes.dtype.name, state.nu.codes.dtype.name) == ("complex64", "float32")
        plain = adamite.scale_by_adam()
        expected, _ = jax.jit(plain.update)(params, plain.init(params))
        np.testing.assert_array_equal(updates, expected)

    def test_large_complex_leaves_are_refused_by_path(self):
        params = {"a": [jnp.ones(2), jnp.ones(4096, jnp.complex64)]}
        with pytest.raises(ValueError, match=r"complex parameter cannot be kept in int8: params\['a'\]\[1\]"):
            adamite.adam(1e-2, moments="int8").init(params)
