"""Any tree of any floating arrays: hypothesis looks for one that breaks the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import adamite
from bits import assert_same_bits

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)

of_trees = settings(max_examples=15)  # each has shapes of its own, for which everything is compiled


class Node:
    """A dataclass of the user's, with a leaf and a subtree."""

    def __init__(self, leaf, rest):
        self.leaf, self.rest = leaf, rest


jax.tree_util.register_pytree_node(Node, lambda n: ((n.leaf, n.rest), None), lambda _, c: Node(*c))


@st.composite
def leaves(draw, dtypes=DTYPES):
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 3, shape)
    return jnp.asarray(x + 1j * rng.standard_normal(shape) if dtype == jnp.complex64 else x, dtype)


def trees(leaf):
    """Up to two nested trees in a list: never None alone, which as `params` means that they are left out."""
    nested = st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
            | st.builds(Node, inner, inner)
        ),
        max_leaves=5,
    )
    return st.lists(nested, max_size=2)


def kinds(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def gradients_like(params):
    return jax.tree.map(lambda p: (p * 0.5 + 0.25).astype(p.dtype), params)


@pytest.mark.more
@of_trees
@given(trees(leaves()), st.booleans())
def test_structure_shapes_and_dtypes_hold(params, nesterov):
    tx = adamite.adamw(1e-2, nesterov=nesterov)
    state = tx.init(params)
    updates, after = tx.update(gradients_like(params), state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert kinds(updates) == kinds(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert kinds(after) == kinds(state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, after)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(after[0].nu))


@of_trees
@given(trees(leaves(dtypes=[jnp.float32])))
def test_float32_trees_are_optax(params):
    def run(tx):
        return tx.update(gradients_like(params), tx.init(params), params)

    ours, theirs = run(adamite.adamw(1e-2)), run(optax.adamw(1e-2))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-30)  # eager: optax jits 1 - b^t, which rounds differently


@pytest.mark.more
@of_trees
@given(trees(leaves()))
def test_zero_gradients_move_nothing(params):
    tx = adamite.adam(1e-2)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params))
    assert all((x == 0).all() for x in jax.tree.leaves(updates))


@pytest.mark.more
@of_trees
@given(trees(leaves(dtypes=[jnp.float32])), st.floats(1e-3, 1e3))
def test_the_direction_does_not_depend_on_the_gradients_size(params, scale):
    tx = adamite.scale_by_adam(eps=0.0, eps_root=1e-38)
    gradients = jax.tree.map(lambda p: jnp.sign(p) * (1 + jnp.abs(p)), params)
    a, _ = tx.update(gradients, tx.init(params))
    b, _ = tx.update(jax.tree.map(lambda g: g * scale, gradients), tx.init(params))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@of_trees
@given(trees(leaves()))
def test_a_step_is_pure(params):
    """The inputs are left as they were, and the same inputs give the same bits."""
    tx, g = adamite.adamw(1e-2), gradients_like(params)
    state = tx.init(params)
    copies = jax.tree.map(lambda x: np.array(x), (params, g, state))
    first, second = tx.update(g, state, params), tx.update(g, state, params)
    assert_same_bits(first, second)
    assert_same_bits(jax.tree.map(np.asarray, (params, g, state)), copies)


@given(st.floats(0, 0.9375), st.floats(0, 0.9375), st.integers(1, 2**31 - 1))
def test_bias_correction_of_a_constant_is_the_constant(b1, b2, seed):
    g = jnp.float32(np.random.default_rng(seed).uniform(0.1, 10))
    m, v = jnp.zeros(()), jnp.zeros(())
    for count in range(1, 6):
        m, v = adamite.update_moment(g, m, b1, 1), adamite.update_moment(g, v, b2, 2)
        np.testing.assert_allclose(adamite.bias_correction(m, b1, jnp.int32(count)), g, rtol=1e-5)
        np.testing.assert_allclose(adamite.bias_correction(v, b2, jnp.int32(count)), g**2, rtol=1e-5)


def test_float64_leaves_beside_float32_ones():
    with jax.enable_x64(True):
        dtypes = {"narrow": jnp.float32, "wide": jnp.float64, "half": jnp.bfloat16}
        params = {name: jnp.ones(3, dtype) for name, dtype in dtypes.items()}
        tx = adamite.adam(1e-2)
        updates, state = tx.update(params, tx.init(params), params)
        assert [x.dtype.name for x in jax.tree.leaves(updates)] == ["bfloat16", "float32", "float64"]
        alone, _ = tx.update(params, tx.init(params))
        assert [x.dtype.name for x in jax.tree.leaves(alone)] == ["float32", "float32", "float64"]
        assert [x.dtype.name for x in jax.tree.leaves(state[0].nu)] == ["float32", "float32", "float64"]
        np.testing.assert_allclose(updates["wide"], -1e-2, rtol=2e-8)
