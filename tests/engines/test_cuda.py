"""The kernels for GPUs, emulated on a CPU, beside the compiled kernels for CPUs: the same bits."""

import ctypes
import shutil
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamite
from adamite import storage
from adamite.core import Rule, chain, from_rule
from adamite.engines import Leaf, LeafStep
from adamite.engines.choice import may_have_kernel
from adamite.engines.leaf_step import Place
from adamite.engines.native import cuda, gpu
from adamite.engines.native.program import UnsupportedError
from engines.emulation import FLAGS, HERE, by_emulation, run, step_group
from engines.test_native import ADAMW, WEIGHTS, assert_same_bits, by_kernels, by_xla, leaves_of, normal
from engines.test_programs import grid

pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the text is compiled by g++")

SHAPES = [(16, 512), (7, 1000), (5, 769), (3, 37), (1000,), (255,), (), (2, 3, 260), (1, 256), (4099, 2), (17, 257)]
ODD = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -1e-42, 3e38, 1e-20]


def odd(shapes, dtype, seed):
    """Gradients of all sizes, of which one in twenty is infinite, NaN, 0, subnormal or huge."""
    rng = np.random.default_rng(seed)
    made = []
    for shape in shapes:
        x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, shape)
        made.append(jnp.asarray(np.where(rng.random(shape) < 0.05, rng.choice(ODD, shape), x), dtype))
    return made


def assert_same(tx, params, grads, state, result):
    """The same bits by both kernels; beside XLA's operations, one by one, where CPUs have none: updates in float32."""
    step, _, leaves, _ = leaves_of(tx, params, grads, state, result)
    ours = by_emulation(tx, params, grads, state, result)
    if result == "weights" or all(may_have_kernel("auto", step, leaf) for leaf in leaves):
        theirs = by_kernels(tx, params, grads, state, result)
        assert_same_bits(without_nan_blocks(ours), without_nan_blocks(theirs))
        return theirs
    theirs = by_xla(tx, params, grads, state, result)
    for x, y in zip(*map(jax.tree.leaves, (without_nan_blocks(ours), without_nan_blocks(theirs))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2**-21)  # XLA's reciprocal root is not rounded to the nearest
    return theirs


def without_nan_blocks(stepped):
    """Blocks of which the scale is NaN have no codes that mean anything: they depend on the sign of NaN."""

    def codes(x):
        if not isinstance(x, storage.Quantized) or x.codes.dtype == jnp.float32:
            return x
        bad = jnp.repeat(jnp.isnan(x.scales), 256, -1)[..., : x.codes.shape[-1]]
        return storage.Quantized(jnp.where(bad, 0, x.codes), x.scales)

    pairs = jax.tree.map(lambda x: _by_leaf(x) if isinstance(x, storage.Quantized) else x, stepped, is_leaf=_is_pair)
    return jax.tree.map(codes, pairs, is_leaf=_is_pair)


def _is_pair(x):
    return isinstance(x, storage.Quantized)


def _by_leaf(x):
    """A pair of trees as a tree of pairs."""
    return jax.tree.map(storage.Quantized, x.codes, x.scales)


@pytest.mark.more
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("moments", grid.MOMENTS)
@pytest.mark.parametrize("recipe", grid.RECIPES)
def test_every_step_of_the_grid(recipe, moments, weights):
    """Two steps and an update of ordinary gradients, then one of odd ones."""
    own, gradients, rounding = weights
    tx = grid.RECIPES[recipe](0, moments=moments, rounding=rounding)
    shapes = [(20, 512), (5, 769), (37,)]
    params = normal(shapes, own, 0)
    state = tx.init(params)
    for make, seed in ((normal, 1), (normal, 2), (odd, 3)):
        grads = make(shapes, gradients, seed)
        assert_same(tx, params, grads, state, "update")
        params, state = assert_same(tx, params, grads, state, "weights")


@pytest.mark.parametrize("moments", grid.MOMENTS)
@pytest.mark.parametrize("rounding", [None, "stochastic", "residual8", "residual16"])
def test_all_shapes(moments, rounding):
    dtype = "bfloat16" if rounding else "float32"
    tx = ADAMW(moments=moments, rounding=rounding)
    params = normal(SHAPES, dtype, 0)
    state = tx.init(params)
    for make in (normal, odd):
        grads = make(SHAPES, dtype, 1)
        assert_same(tx, params, grads, state, "update")
        params, state = assert_same(tx, params, grads, state, "weights")


def leaf_of(tx, shape, dtype="float32", result="weights", seed=0):
    """The step, what it takes once, and a leaf."""
    params, grads = normal([shape], dtype, seed), normal([shape], dtype, seed + 1)
    step, scalars, (leaf,), _ = leaves_of(tx, params, grads, tx.init(params), result)
    return step, scalars, leaf


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        ((64, 512), np.s_[16:32, :]),
        ((64, 512), np.s_[:, 256:]),
        ((4, 8, 512), np.s_[:, 2:4, :]),
        ((4, 8, 6, 256), np.s_[1:3, 2:4, 3:6, :]),
        ((6, 8, 100), np.s_[2:4, 4:8, :]),
        ((5120,), np.s_[1280:2560]),
    ],
)
def test_a_part_is_stepped_as_in_the_whole(whole, cut):
    """Random bits are those of the element's number in the whole leaf, wherever the part lies."""
    tx = ADAMW(moments="int8", rounding="stochastic")
    step, scalars, leaf = leaf_of(tx, whole, "bfloat16")
    firsts = np.arange(np.prod(whole), dtype=np.uint32).reshape(whole)[cut].flat[0]

    def part(x):
        """What belongs to the part, of an array of elements or of blocks."""
        ends = [slice(s.start, s.stop) for s in (cut if isinstance(cut, tuple) else (cut,))]
        if x.shape != leaf.g.shape and x.ndim == leaf.g.ndim:
            ends[-1] = slice(*(None if end is None else -(-end // 256) for end in (ends[-1].start, ends[-1].stop)))
        return x[tuple(ends)] if x.shape != (1,) * x.ndim else x

    own = jax.tree.map(part, leaf._replace(place=None, dtype=None, path=None, number=None, sharding=None))
    own = own._replace(number=leaf.number, dtype=leaf.dtype, path="", place=Place(whole, jnp.uint32(firsts)))
    (stepped,), (expected,) = run(step, scalars, [own]), run(step, scalars, [leaf])
    assert_same_bits(stepped, jax.tree.map(part, expected))


def test_leaves_of_one_kind_are_stepped_by_one_launch():
    """Each CTA finds its leaf: leaves of one block, of many, and of less."""
    tx = ADAMW()
    shapes = [(300,), (1,), (70, 256), (5,), (4096,), (255,), (257,), (40, 3)] * 12
    params, grads = normal(shapes, "float32", 0), normal(shapes, "float32", 1)
    state = tx.init(params)
    assert_same(tx, params, grads, state, "weights")


OPERATIONS = {
    "exp": lambda g, m: jnp.exp(-jnp.abs(g)) * m,
    "tanh": lambda g, m: jnp.tanh(g) + jnp.log1p(jnp.abs(m)),
    "atan2": lambda g, m: jnp.arctan2(g, jnp.abs(m) + 1e-3),
    "cube": lambda g, m: g**3 + 1 / (1 + m**2),
    "power": lambda g, m: jnp.sign(g) * jnp.abs(g) ** 0.75 + jnp.clip(m, -1, 1),
    "where": lambda g, m: jnp.where((g > 0) & ~(m > g), jnp.maximum(g, m), jnp.minimum(g, m)),
    "rounding": lambda g, m: jnp.floor(g) + jnp.ceil(m) + jnp.round(4 * g) / 4,
    "sigmoid": lambda g, m: jax.nn.sigmoid(g) * jax.lax.rsqrt(m * m + 1e-3),
    "integers": lambda g, m: (g * 100).astype(jnp.int32).astype(jnp.float32) / 100 + m,
    "narrow integers": lambda g, m: (
        sum((3e4 * g).astype(x).astype(jnp.float32) for x in ("int8", "uint8", "int16")) + m
    ),
    "float16": lambda g, m: (g.astype(jnp.float16) * m.astype(jnp.float16)).astype(jnp.float32),
    "bfloat16": lambda g, m: (g.astype(jnp.bfloat16) + m.astype(jnp.bfloat16)).astype(jnp.float32),
}


class Own(NamedTuple):
    """The state of the rules below."""

    mu: Any


def own_rule(operation, moments="float32", start=0.0):
    """An optimizer of which adamite knows nothing."""

    def step(scalars, g, m):
        del scalars
        m = start + 0.9 * m + 0.1 * g
        return operation(g, m), m

    rule = Rule(lambda: (), step)
    return chain(from_rule(rule, Own, {"mu": storage.Dense()}, moments), adamite.scale_by_learning_rate(0.1))


def test_what_is_not_there_does_not_count():
    """A moment that is large where nothing is: the largest of a block is that of its elements."""
    tx, shapes = own_rule(lambda g, m: m, "int8", start=1.0), [(20, 300)]
    params, grads = [jnp.ones(shape) for shape in shapes], [jnp.full(shape, -9.0) for shape in shapes]
    state = tx.init(params)
    ours, theirs = by_emulation(tx, params, grads, state), by_xla(tx, params, grads, state)
    np.testing.assert_array_equal(ours[1][0].mu.scales[0], theirs[1][0].mu.scales[0])


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rule_of_ones_own(name, moments):
    """Whatever operations it is made of: to a few roundings, since each compiler has its own functions."""
    tx, shapes = own_rule(OPERATIONS[name], moments), [(20, 512), (300,)]
    params, grads = normal(shapes, "float32", 0), normal(shapes, "float32", 1)
    state = tx.init(params)
    ours, theirs = by_emulation(tx, params, grads, state), by_xla(tx, params, grads, state)
    for a, b in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "residual8"])
def test_float16(rounding, moments):
    """It has no kernels for CPUs: beside XLA's operations, one by one."""
    tx, shapes = ADAMW(moments=moments, rounding=rounding), [(20, 512), (5, 769), (37,)]
    params, grads = normal(shapes, "float16", 0), normal(shapes, "float16", 1)
    state = tx.init(params)
    for result in ("weights", "update"):
        assert_same_bits(*(by(tx, params, grads, state, result) for by in (by_emulation, by_xla)))


def test_what_is_asked_of_a_blocks_first_element():
    def update(scalars, number, index, g, p, stored):
        first = (index() * jnp.uint32(3) + jnp.uint32(5))[:1]
        return g + first.astype(jnp.int32).astype(jnp.float32), stored

    step = LeafStep(update, ends_with_weights=False)
    ((u, _),) = run(step, (), [Leaf(0, jnp.zeros((4, 512)), None, (), jnp.dtype("float32"))])
    np.testing.assert_array_equal(u, 5 + 3 * 256 * np.repeat(np.arange(8), 256).reshape(4, 512))


def test_what_no_kernel_does_is_said():
    step, scalars, leaf = leaf_of(own_rule(lambda g, m: jax.lax.lgamma(g) + m), (300,))
    with pytest.raises(UnsupportedError, match="no kernel does lgamma of float32"):
        cuda.source(gpu.program_of(step, scalars, leaf))
    tx = adamite.adam(1e-2, moments=storage.Blockwise(block=128))
    step, scalars, leaf = leaf_of(tx, (64, 256))
    with pytest.raises(UnsupportedError, match="its blocks have 128 elements, and kernels are for 256"):
        cuda.source(gpu.program_of(step, scalars, leaf))


def test_another_setting_is_the_same_text():
    texts = set()
    for rate, b2 in ((1e-2, 0.999), (3e-4, 0.95)):
        step, scalars, leaf = leaf_of(adamite.adamw(rate, b2=b2, moments="int8"), (64, 256))
        texts.add(cuda.source(gpu.program_of(step, scalars, leaf)))
    assert len(texts) == 1


WHERE = """
#include "shim.h"
#define ARRAYS 1
#define RUN 8
#define WARPS 8
#define TURNS 4
#include "cuda.cuh"

extern "C" void where(const uint64_t* leaf, const unsigned* words, unsigned block, uint64_t* found) {
  Leaf its{leaf[0], leaf[1], 0, 0, 0, (unsigned short)leaf[2], 1, {nullptr}};
  const Block at = locate(its, words, block, (unsigned)((its.columns + 255) >> 8));
  found[0] = at.element, found[1] = at.base, found[2] = at.valid, found[3] = at.full;
}
"""


@pytest.mark.parametrize(
    ("rows", "columns", "words", "block", "found"),
    [
        (1, 2**39, [5], 2**31 - 1, (2**39 - 256, 2**32 - 251, 256, 1)),
        (1, 2**33 + 100, [0], 2**25, (2**33, 0, 100, 0)),
        (2**20, 2**13, [0], 2**24 + 33, ((2**19 + 1) * 2**13 + 256, 2**13 + 256, 256, 1)),
        (2**30, 300, [7], 2 * 10**8 + 1, (300 * 10**8 + 256, (300 * 10**8 + 263) % 2**32, 44, 0)),
        (6, 512, [9, 2, 10**6, 3, 10**4], 2 * 4 + 1, (4 * 512 + 256, 9 + 10**6 + 10**4 + 256, 256, 1)),
    ],
)
def test_where_a_block_lies(tmp_path, rows, columns, words, block, found):
    """Beyond 2^31 elements, too; and in rows that lie apart in the whole leaf."""
    (tmp_path / "where.cc").write_text(WHERE)
    folders = [f"-I{HERE}", f"-I{cuda.PRELUDE.parent}"]
    built = tmp_path / "where.so"
    subprocess.run(["g++", *FLAGS, *folders, str(tmp_path / "where.cc"), "-o", str(built)], check=True)
    leaf, words = np.array([rows, columns, len(words) // 2], np.uint64), np.array(words, np.uint32)
    at = np.zeros(4, np.uint64)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (leaf, words, at)]
    ctypes.CDLL(str(built)).where(*pointers[:2], block, pointers[2])
    assert tuple(map(int, at)) == found


def test_an_update_does_not_lie_over_the_gradient():
    step, scalars, leaf = leaf_of(ADAMW(moments="int8"), (64, 256), result="update")
    its = gpu.program_of(step, scalars, leaf)
    assert its.outputs[0].place == -1
    before = np.array(leaf.g)
    step_group(its, scalars, [leaf])
    np.testing.assert_array_equal(leaf.g, before)
