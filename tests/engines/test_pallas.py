"""The Pallas kernel, interpreted: every rule, storage and rounding, and arrays of every shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.engines import pallas
from engines.cases import ROUNDINGS, adamw, assert_close, by, compare, tree
from specs import SPECS

pytestmark = pytest.mark.few(2)

STORAGES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "float8": ("int8", "float8")}
WHOLE_LEAF = {"stable_adamw", "adam_mini"}
RULES = [spec for spec in SPECS if spec.full and spec.name not in WHOLE_LEAF and hasattr(spec.build(), "part")]
LEAVES = [(16, 300)]
"""A leaf of which each second block ends early."""


@pytest.mark.parametrize("moments", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("spec", RULES, ids=str)
def test_every_rule(spec, moments):
    compare(pallas, spec.build(moments=moments), LEAVES, steps=1)


@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
@pytest.mark.parametrize("moments", STORAGES.values(), ids=list(STORAGES))
def test_every_storage_and_rounding(moments, rounding):
    compare(pallas, adamw(moments, rounding), LEAVES, jnp.bfloat16 if rounding else jnp.float32, steps=1)


SHAPES = {
    "numbers and vectors": [(), (129,), (5000,)],
    "last axes": [(40, 1), (3, 127), (40, 129)],
    "several tiles": [(70, 5000)],
    "many axes": [(2, 33, 300), (1, 2, 3, 4, 5)],
    "more vectors": [(1,), (127,), (1024,), (8192,)],
    "more axes": [
        (70, 257),
        (2, 256),
        (64, 512),
        (9000, 33),
        (3, 5, 7),
        (17, 1, 4100),
        (2, 3, 4, 5),
        (1, 1, 2, 3, 130),
    ],
}


@pytest.mark.few(1)
@pytest.mark.parametrize("moments", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("shapes", [pytest.param(x, marks=[pytest.mark.slow] * x.startswith("more")) for x in SHAPES])
def test_every_shape(shapes, moments):
    compare(pallas, adamw(moments, "residual8"), SHAPES[shapes], jnp.bfloat16, steps=1)


@pytest.mark.more
def test_random_bits_are_those_of_the_element():
    """Stochastic rounding of weights: the same everywhere, to the bit."""
    tx = adamw("float32", "stochastic")
    shapes = [(70, 300), (7,), (2, 40, 130)]
    params = tree(shapes, dtype=jnp.bfloat16)
    ours = by(pallas, tx)(params, tx.init(params), params)[0]
    theirs = by(None, tx)(params, tx.init(params), params)[0]
    for a, b in zip(ours, theirs, strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e-40, -0.0, 3e38])
def test_what_is_no_ordinary_number(value):
    """It stays in its block."""
    tx, params = adamw("int8"), tree([(8, 600)])
    grads = [params[0].at[3, 300].set(value)]
    (ours, state), (theirs, states) = (by(kernel, tx)(params, tx.init(params), grads) for kernel in (pallas, None))
    ours = ours, adamite.convert_moments(state, "float32")
    theirs = theirs, adamite.convert_moments(states, "float32")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.mean(~np.isclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)) <= 1e-3
    assert np.isfinite(ours[0][0][:3]).all()
    assert np.isfinite(ours[1][0].mu[0][3, :256]).all()


def test_scalars_may_be_traced_or_not():
    hyperparams = optax.inject_hyperparams(lambda b1, lr: adamite.adamw(lr, b1))
    tx, params = hyperparams(b1=0.8, lr=1e-2), tree(LEAVES)
    state = tx.init(params)

    def step(engine):
        inner = adamite.adamw(state.hyperparams["lr"], state.hyperparams["b1"])
        return jax.jit(lambda g, s, p: inner.step(g, s, p, engine=engine))(params, state.inner_state, params)

    assert_close(step("pallas"), step("xla"))


def test_leaves_that_are_alike_share_a_kernel():
    """The kernel is lowered once: a leaf's number, from which random bits are made, is an operand."""
    tx = adamw("int8", "stochastic")
    params = tree([(64, 512), (300,), (3, 40)] * 4, dtype=jnp.bfloat16)
    text = by(pallas, tx).lower(params, tx.init(params), params).as_text()
    assert text.count("func.func private @launch") == 3
