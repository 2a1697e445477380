"""The core of the contract, on any bits at all: 10,000 cases drawn by hypothesis, and 100,000 by `make test-all`.

A case is an optimizer, two steps' gradients and a number for each hyperparameter, which are traced, so that nothing is
compiled twice. The bits of gradients are drawn, not their values: every NaN, infinity, subnormal and -0 comes up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adamite
from adamite.storage import Blockwise
from bits import bits

pytestmark = pytest.mark.more

SHAPES = {
    "matrix": ((2, 3), jnp.float32),
    "short": ((5,), jnp.bfloat16),
    "half": ((3,), jnp.float16),
    "one": ((), jnp.float32),
}
WORDS = sum(int(np.prod(shape)) for shape, _ in SHAPES.values())
PARAMS = {
    name: jnp.linspace(-1, 1, max(int(np.prod(shape)), 1)).reshape(shape).astype(dtype)
    for name, (shape, dtype) in SHAPES.items()
}


class Way(NamedTuple):
    ours: object
    twin: object = None  # optax's, where the bits are its
    bounded: bool = False  # by Adam's bound, see below


WAYS = {
    "adam": Way(adamite.adam, optax.adam, bounded=True),
    "nadam": Way(adamite.nadam, optax.nadam),
    "adamw": Way(
        lambda rate, b1, b2: adamite.adamw(rate, b1, b2, weight_decay=0.1),
        lambda rate, b1, b2: optax.adamw(rate, b1, b2, weight_decay=0.1),
    ),
    "adabelief": Way(adamite.adabelief, optax.adabelief),
    "adamax": Way(adamite.adamax, optax.adamax),
    "amsgrad": Way(adamite.amsgrad, optax.amsgrad),
    "lion": Way(lambda rate, b1, b2: adamite.lion(rate, b1, b2), lambda rate, b1, b2: optax.lion(rate, b1, b2)),
    "laprop": Way(adamite.laprop),
    "adam_atan2": Way(adamite.adam_atan2),
    "bfloat16": Way(lambda rate, b1, b2: adamite.adamw(rate, b1, b2, moments="bfloat16", rounding="residual8")),
    "int8": Way(
        lambda rate, b1, b2: adamite.adam(rate, b1, b2, moments=Blockwise(smallest=1, block=4), rounding="stochastic")
    ),
    "guarded": Way(lambda rate, b1, b2: adamite.skip_nonfinite(adamite.adamw(rate, b1, b2))),
}


@functools.cache
def program(make):
    """Two steps, from the parameters above: all that they give."""

    @jax.jit
    def run(numbers, first, second):
        tx = make(*numbers)
        start = state = tx.init(PARAMS)
        params, found = PARAMS, []
        for g in (first, second):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            found.append((updates, state, params))
        return start, found

    return run


def gradients(data):
    """The drawn bits as a tree: in 16 bits, their upper halves."""
    words, tree = np.frombuffer(data, np.uint32), {}
    for name, (shape, dtype) in SHAPES.items():
        n = max(int(np.prod(shape)), 1)
        mine, words = words[:n], words[n:]
        short = np.dtype(dtype).itemsize == 2
        tree[name] = (
            (mine >> 16).astype(np.uint16).view(dtype).reshape(shape) if short else mine.view(np.float32).reshape(shape)
        )
    return tree


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def is_finite(tree):
    return all(
        np.isfinite(np.asarray(x, np.float32)).all()
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


def bound(t, b1, b2):
    """The largest |m_hat| / sqrt(v_hat) of Adam after one step or two: Cauchy and Schwarz on the weighted sums."""
    if t == 1:
        return 1.0
    ratio = (1 - b1) ** 2 / (1 - b2) * (1 + b1**2 / b2)
    return np.sqrt(ratio * (1 - b2**2)) / (1 - b1**2)


def check(name, data, rate, b1, b2):
    way, numbers = WAYS[name], tuple(np.float32(x) for x in (rate, b1, b2))
    size = len(data) // 2
    first, second = gradients(data[:size]), gradients(data[size:])
    start, found = jax.device_get(program(way.ours)(numbers, first, second))
    before = start, PARAMS
    for t, g, (updates, state, params) in zip((1, 2), (first, second), found, strict=True):
        assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        assert kinds(state) == kinds(start)
        assert kinds(params) == kinds(PARAMS)
        if name == "guarded":
            assert is_finite((updates, state, params))
            if not is_finite(g):
                assert_bits((state.inner, params), (before[0].inner, before[1]))
        if way.bounded and is_finite(updates):
            largest = max(np.abs(np.asarray(u, np.float32)).max() for u in updates.values())
            assert largest <= 1.01 * numbers[0] * bound(t, *map(float, numbers[1:])) + 2.0**-24  # float16 has no less
        before = state, params
    if way.twin:
        # On float32 leaves alone: in 16 bits optax's state is another.
        theirs = jax.device_get(program(way.twin)(numbers, first, second))[1]
        for ours_step, their_step in zip(found, theirs, strict=True):
            for leaf in ("matrix", "one"):
                assert_bits(ours_step[0][leaf], their_step[0][leaf])


def assert_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        same = (bits(a) == bits(b)).reshape((*np.shape(a), -1)).all(-1) if np.size(a) else True
        assert np.all(same | (np.isnan(np.asarray(a, np.float32)) & np.isnan(np.asarray(b, np.float32))))


CASES = {
    "name": st.sampled_from(sorted(WAYS)),
    "data": st.binary(min_size=8 * WORDS, max_size=8 * WORDS),
    "rate": st.floats(2.0**-20, 1.0, width=32),
    "b1": st.floats(0, 0.984375, width=32),
    "b2": st.floats(2.0**-7, 0.9990234375, width=32),
}


@settings(max_examples=10_000)
@given(**CASES)
def test_ten_thousand_cases(name, data, rate, b1, b2):
    check(name, data, rate, b1, b2)


@pytest.mark.slow
@settings(max_examples=100_000, derandomize=False, database=None)
@given(**CASES)
def test_a_hundred_thousand_cases(name, data, rate, b1, b2):
    check(name, data, rate, b1, b2)
