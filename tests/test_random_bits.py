"""The counter hash: even in every direction in which its bits are drawn, and different wherever they should be."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.random_bits import element_index, fold, random_bits, row_major, uniform
from adamite.rounding import Stochastic

N = 1 << 16
INDEX = element_index((N,))


def key(seed=0, step=1, moment=0, leaf=0):
    """As the engine folds it, moment by moment and leaf by leaf."""
    return fold(fold(fold(seed, step), moment), leaf)


def keys(*, seed=(0,), step=(1,), moment=(0,), leaf=(0,)):
    grid = [jnp.asarray(x, jnp.uint32).ravel() for x in np.meshgrid(seed, step, moment, leaf)]
    return jax.jit(jax.vmap(key))(*grid)


ALONG = {
    "elements": lambda: np.asarray(random_bits(key(), INDEX)),
    "elements, later": lambda: np.asarray(random_bits(key(7, 31_337, 1, 12), INDEX + jnp.uint32(2**31))),
    "every 256th": lambda: np.asarray(random_bits(key(), INDEX * jnp.uint32(256))),
    "steps": lambda: np.asarray(random_bits(keys(step=range(N)), jnp.uint32(5))),
    "seeds": lambda: np.asarray(random_bits(keys(seed=range(N)), jnp.uint32(5))),
    "leaves": lambda: np.asarray(random_bits(keys(leaf=range(N)), jnp.uint32(5))),
    "leaves and steps": lambda: np.asarray(random_bits(keys(step=range(256), leaf=range(256)), jnp.uint32(5))),
}
along = pytest.mark.parametrize("direction", ALONG)


def chi_square(counts):
    """How many standard deviations the statistic is from its mean, were all cells as likely."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (np.sum((counts - expected) ** 2) / expected - freedom) / math.sqrt(2 * freedom)


@along
def test_chi_square_of_bytes(direction):
    bits = ALONG[direction]()
    for byte in range(4):
        counts = np.bincount((bits >> (8 * byte)) & 255, minlength=256)
        assert abs(chi_square(counts)) < 4.5  # 28 of them: 2e-4 by chance, for all


@along
def test_chi_square_of_neighbouring_pairs(direction):
    """Upper four bits of two neighbours, together: 256 cells. Rounding uses the upper bits."""
    bits = ALONG[direction]() >> 28
    assert abs(chi_square(np.bincount(bits[:-1] * 16 + bits[1:], minlength=256))) < 4.5


@along
@pytest.mark.parametrize("lag", [1, 2, 256])
def test_neighbours_do_not_correlate(direction, lag):
    x = np.asarray(uniform(jnp.asarray(ALONG[direction]()), 16), np.float64)
    correlation = np.corrcoef(x[:-lag], x[lag:])[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(N)


@pytest.mark.parametrize(
    "pair", [*itertools.combinations([{}, {"seed": 1}, {"step": 2}, {"moment": 1}, {"leaf": 1}], 2)], ids=str
)
def test_streams_differ_and_do_not_correlate(pair):
    a, b = (np.asarray(random_bits(key(**where), INDEX)) for where in pair)
    assert (a == b).mean() < 1e-3
    x, y = (np.asarray(uniform(jnp.asarray(bits), 16), np.float64) for bits in (a, b))
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(N)
    # Nor is one the other, begun elsewhere in the first thousand elements.
    assert not np.isin(b[:1000], a[:1000]).mean() > 0.01


def test_a_bijection_of_the_indices():
    """All different, as 2^16 random numbers of 32 bits hardly ever are: no two elements share their bits."""
    assert np.unique(ALONG["elements"]()).size == N


@pytest.mark.parametrize("what", ["index", "step", "seed", "leaf"])
def test_avalanche(what):
    """Each bit of what is hashed flips each bit of the hash in about half of all cases."""
    n = 4096
    start = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)

    def hashed(x):
        x = jnp.asarray(x)
        if what == "index":
            return random_bits(key(), x)
        make = {"step": lambda x: key(step=x), "seed": lambda x: key(seed=x), "leaf": lambda x: key(leaf=x)}[what]
        return random_bits(jax.vmap(make)(x), jnp.uint32(3))

    hashed = jax.jit(hashed)
    plain = np.asarray(hashed(start))
    flips = np.stack([plain ^ np.asarray(hashed(start ^ np.uint32(1 << bit))) for bit in range(32)])
    share = ((flips[..., None] >> np.arange(32, dtype=np.uint32)) & 1).mean(1)
    # Chance alone gives 1/128 root mean square; lowbias32 is known for a bias of a few thousandths beside it.
    assert np.abs(share - 0.5).max() < 5 / 128
    assert np.sqrt(np.mean((share - 0.5) ** 2)) < 1.1 / 128


def test_uniform_is_the_upper_bits_in_0_to_1():
    bits = jnp.array([0, 2**31, 2**32 - 1, 1], jnp.uint32)
    np.testing.assert_array_equal(uniform(bits, 16), [0, 0.5, 1 - 2**-16, 0])
    np.testing.assert_array_equal(uniform(bits, 12), [0, 0.5, 1 - 2**-12, 0])
    assert uniform(bits, 16).dtype == jnp.float32


def test_fold_takes_any_integers_modulo_2_32():
    for seed, same in ((-1, 2**32 - 1), (2**32 + 5, 5), (np.int64(3), 3), (jnp.int32(7), jnp.uint32(7))):
        assert fold(seed, 1) == fold(same, 1)
    assert fold(0, 1) != fold(1, 0)
    assert fold(0, 1).dtype == jnp.uint32


class TestElementIndex:
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 1), (0, 4)])
    def test_is_arange(self, shape):
        index = element_index(shape)
        assert index.dtype == jnp.uint32
        np.testing.assert_array_equal(index, np.arange(math.prod(shape)).reshape(shape))

    @pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
    def test_strides_are_numpys(self, shape):
        assert row_major(shape) == tuple(stride // 8 for stride in np.zeros(shape).strides)

    def test_other_strides(self):
        index = element_index((2, 3), (100, 7))
        np.testing.assert_array_equal(index, [[0, 7, 14], [100, 107, 114]])

    def test_large_arrays_count_modulo_2_32(self):
        np.testing.assert_array_equal(element_index((3, 2), (2**31, 2**32 + 1)), [[0, 1], [2**31, 2**31 + 1], [0, 1]])


class TestWhatTheEngineDraws:
    """Leaves, steps, moments and seeds have bits of their own; ties in all of them show it."""

    def landed(self, seed=0, steps=1):
        """Which weights went up, of those half way between two bfloat16 neighbours: it is the upper bit alone."""
        tx = adamite.round_weights(Stochastic(seed=seed))
        params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones((64, 64), jnp.bfloat16)}
        half = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8), params)
        state, update, went_up = tx.init(params), jax.jit(tx.update), []
        for _ in range(steps):
            updates, state = update(half, state, params)
            new = optax.apply_updates(params, updates)
            went_up.append({name: np.asarray(p, np.float32).ravel() > 1 for name, p in new.items()})
        return went_up

    def test_differ_between_leaves_steps_and_seeds(self):
        (first, second), (other,) = self.landed(steps=2), self.landed(seed=1)
        draws = [first["a"], first["b"], second["a"], second["b"], other["a"], other["b"]]
        for ups in draws:
            assert abs(ups.mean() - 0.5) < 4.5 * 0.5 / 64
        for one, two in itertools.combinations(draws, 2):
            assert abs((one == two).mean() - 0.5) < 4.5 * 0.5 / 64

    def test_are_the_same_for_the_same(self):
        once, again = self.landed(), self.landed()
        np.testing.assert_array_equal(once[0]["a"], again[0]["a"])

    def test_differ_between_moments(self):
        tx = adamite.scale_by_adam(b1=0.0, b2=0.0, moments="bfloat16")
        g = jnp.full(4096, 1 + 17 * 2.0**-8)  # it and its square lie about half way between two bfloat16 neighbours
        _, state = tx.update(g, tx.init(g))
        ups = [np.asarray(m, np.float64) > exact for m, exact in ((state.mu, g[0]), (state.nu, g[0] ** 2))]
        assert abs(ups[0].mean() - 0.5) < 4.5 * 0.5 / 64
        assert abs(ups[1].mean() - 289 / 512) < 4.5 * 0.5 / 64
        assert abs(np.corrcoef(*ups)[0, 1]) < 4.5 / 64
