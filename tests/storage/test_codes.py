"""The 8-bit maps: all 256 codes against tables from the papers, and both ways of rounding to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamite.random_bits import element_index, fold, random_bits
from adamite.storage.codes import GUARD, HALF, STEP, UE5M3, CubicSigned, CubicUnsigned, random_r
from reference import codes as reference

pytestmark = pytest.mark.few(2)

SIGNED, UNSIGNED, FLOAT8 = CubicSigned(), CubicUnsigned(), UE5M3()
TABLES = {SIGNED: reference.cubic_signed(), UNSIGNED: reference.cubic_unsigned(), FLOAT8: reference.ue5m3()}
ULP = 2.0**-23
PLACES = 2.0**-15  # cubic codes place a number to less than two 2^-16ths of a step
LEAST_R, MOST_R = GUARD, STEP - 1
LEAST = {UNSIGNED: 2, FLOAT8: 1}  # the code that what is below it becomes, if it is above 0
each = pytest.mark.parametrize("code", TABLES, ids=lambda code: type(code).__name__)
each_unsigned = pytest.mark.parametrize("code", [UNSIGNED, FLOAT8], ids=lambda code: type(code).__name__)


def all_codes(code):
    """In the order of their values."""
    if code is SIGNED:
        return jnp.arange(-127, 128).astype(jnp.int8)
    return jnp.arange(256).astype(jnp.uint8).view(code.dtype)


@functools.cache
def all_over(code):
    """Float32 numbers of every size that the map is for, its own, midpoints and powers of eight, and those beside."""
    rng, table = np.random.default_rng(0), TABLES[code]
    edges = np.concatenate([(table[1:] + table[:-1]) / 2, 8.0 ** -np.arange(8), table])
    edges = np.concatenate([edges * (1 - 1e-5), edges, edges * (1 + 1e-5)])
    z = np.clip(np.concatenate([10 ** rng.uniform(-10, 0, 10_000), rng.uniform(0, 1, 10_000), edges]), -1, 1)
    return np.concatenate([z, -z] if code is SIGNED else [z]).astype(np.float32)


@functools.cache
def encode(code):
    return jax.jit(code.encode)


@functools.cache
def decode(code):
    return jax.jit(code.decode)


@each
def test_golden(code):
    table = TABLES[code]
    assert table.size == np.unique(table).size == (255 if code is SIGNED else 256)
    values = decode(code)(all_codes(code))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, table, rtol=2 * ULP, atol=0)


@each
def test_zero_and_the_ends_are_exact(code):
    ends = jnp.array([0.0, -0.0, 1.0])
    for r in (LEAST_R, HALF, MOST_R):
        codes = encode(code)(ends, r)
        assert codes.dtype == code.dtype
        np.testing.assert_array_equal(codes[:2], 0)
        np.testing.assert_array_equal(decode(code)(codes), [0, 0, 1])


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=lambda code: type(code).__name__)
def test_what_is_larger_than_one_is_one(code):
    z = jnp.array([1.0000001, 1.5, 1e30, jnp.inf])
    np.testing.assert_array_equal(encode(code)(z, HALF), code.one)


@each
@pytest.mark.parametrize("r", [LEAST_R, 656, 16_384, HALF, 49_152, 64_880, MOST_R])
def test_a_value_of_the_map_stays_itself(code, r):
    codes = all_codes(code)
    codes = codes[codes != 1] if code is UNSIGNED else codes
    np.testing.assert_array_equal(encode(code)(decode(code)(codes), r), codes)


@each
def test_monotone(code):
    assert (np.diff(decode(code)(all_codes(code))) > 0).all()
    z = np.sort(all_over(code))
    for r in (LEAST_R, HALF, MOST_R):
        assert (np.diff(decode(code)(encode(code)(z, r))) >= 0).all()


@each
def test_half_is_the_nearest(code):
    z, table = all_over(code), TABLES[code]
    if code is not SIGNED:  # nothing above 0 becomes 0
        z, table = z[z > 0], table[LEAST[code] :]
    found = np.asarray(decode(code)(encode(code)(z, HALF)), np.float64)
    best, far = reference.nearest(z, table)
    # Numbers this close to a midpoint may go either way: they are as far from both.
    unsure = 4 * ULP * (np.abs(z) + np.abs(found)) + PLACES * 2 * np.abs(found - z)
    assert (np.abs(found - z) <= far + unsure).all()
    assert np.mean(np.abs(found - best) <= 4 * ULP * np.abs(best)) > 0.98


@each
def test_up_where_it_has_come_more_than_the_share(code):
    z, table = all_over(code), TABLES[code]
    if code is not SIGNED:
        z = z[z >= table[LEAST[code]]]
    r = np.random.default_rng(1).integers(LEAST_R, MOST_R, z.size, endpoint=True).astype(np.int32)
    below, above = reference.neighbours(z, table)
    gap = np.where(above > below, above - below, 1)
    share = (z - below) / gap
    unsure = 4 * ULP * np.abs(z) / gap + PLACES
    found = np.asarray(decode(code)(encode(code)(z, r)), np.float64)
    upwards = np.where(z < 0, 1 - share, share) > (r - GUARD / 2) / STEP  # of magnitudes
    expected = np.where(upwards == (z >= 0), above, below)
    sure = np.abs(np.where(z < 0, 1 - share, share) - (r - GUARD / 2) / STEP) > unsure
    assert sure.mean() > 0.98
    np.testing.assert_allclose(found[sure], expected[sure], rtol=4 * ULP, atol=0)


@each_unsigned
@pytest.mark.parametrize("r", [LEAST_R, HALF, MOST_R])
def test_nothing_above_zero_becomes_zero(code, r):
    z, least = np.float32(10.0) ** -np.arange(0, 38, dtype=np.float32), TABLES[code][LEAST[code]]
    values = decode(code)(encode(code)(z, r))
    assert values.min() > 0
    np.testing.assert_allclose(values[z < least / 10], least, rtol=2 * ULP)


def on_the_way(code):
    """Numbers some share of the way between neighbours, and the gap: where it changes, beside 0 and beside 1."""
    table = TABLES[code] if code is SIGNED else TABLES[code][LEAST[code] :]
    gaps = np.diff(table)
    changes = np.flatnonzero(np.abs(np.diff(gaps)) > 1e-6 * gaps[1:])
    k = np.unique([0, *changes, *changes + 1, gaps.size // 3, gaps.size - 1])
    return np.concatenate([table[k] + share * gaps[k] for share in (0.03, 0.3, 0.9)]), np.tile(gaps[k], 3)


@each
def test_stochastic_rounding_is_right_on_average(code):
    """One draw is off by at most half a gap, root mean square; the bound is five times what 1e5 of them then are."""
    draws = 100_000
    z, gap = on_the_way(code)
    assert z.size > 40
    r = random_r(random_bits(fold(0, 1), element_index((draws,))))
    mean = jax.jit(lambda x: jax.lax.map(lambda one: code.decode(code.encode(jnp.full(draws, one), r)).mean(), x))
    means = np.asarray(mean(jnp.asarray(z, jnp.float32)), np.float64)
    assert (np.abs(means - z) / gap).max() < 2.5 / np.sqrt(draws) + GUARD / STEP  # r is as fine as that


@pytest.mark.few(1)
@each
def test_jitted_codes_are_the_eager_ones(code):
    z, codes = all_over(code), all_codes(code)
    r = np.random.default_rng(2).integers(LEAST_R, MOST_R, z.size, endpoint=True).astype(np.int32)
    np.testing.assert_array_equal(encode(code)(z, HALF), code.encode(z, HALF))
    np.testing.assert_array_equal(encode(code)(z, r), code.encode(z, r))
    np.testing.assert_array_equal(decode(code)(codes), code.decode(codes))
