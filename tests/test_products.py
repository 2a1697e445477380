"""Sums of two products are rounded alike in every program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamite.engines.products import round_products

RNG = np.random.default_rng(0)
A, B, C, D = (jnp.asarray(RNG.standard_normal(2**12), jnp.float32) for _ in range(4))


def guards(f, *args):
    """How many products are rounded before a sum."""
    return str(jax.make_jaxpr(round_products(f))(*args)).count("is_finite")


SUMS = {
    "an average": (lambda a, b, c, d: 0.1 * a + 0.9 * b, 1),
    "of a square": (lambda a, b, c, d: 0.1 * a**2 + 0.9 * b, 1),
    "a difference": (lambda a, b, c, d: a / c - b * b, 1),
    "three products": (lambda a, b, c, d: a * b + c * d + a * d, 1),  # the second sum has one product
    "one product": (lambda a, b, c, d: a * b + c, 0),
    "no product": (lambda a, b, c, d: a + jnp.sqrt(b), 0),
    "a constant": (lambda a, b, c, d: a * b + 1e-8, 0),
}


@pytest.mark.parametrize("case", SUMS)
def test_the_first_of_two_products_is_rounded(case):
    f, expected = SUMS[case]
    assert guards(f, A, B, C, D) == expected
    np.testing.assert_allclose(round_products(f)(A, B, C, D), f(A, B, C, D), rtol=1e-4, atol=1e-6)


def test_one_way_is_left_to_compute_it():
    """Of a b + c d: with the first product rounded, and either none or one rounding more."""

    def f(a, b, c, d):
        return a * b + c * d

    first = np.asarray(A) * np.asarray(B)
    exact = np.asarray(C, np.float64) * np.asarray(D, np.float64) + first
    ways = {"fused": exact.astype(np.float32), "rounded": first + np.asarray(C) * np.asarray(D)}
    found = np.asarray(jax.jit(round_products(f))(A, B, C, D))
    assert any(np.array_equal(found, way) for way in ways.values())


def test_infinities_and_nan_stay():
    def f(a, b):
        return a * b + b * b

    a, b = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3e38]), jnp.array([1.0, 1.0, 1.0, 10.0])
    np.testing.assert_array_equal(round_products(f)(a, b), f(a, b))


def test_trees_functions_and_transformations():
    def f(tree, c):
        return {"x": jnp.where(c > 0, tree["a"] * tree["b"] + c * c, 0), "y": (tree["a"],)}

    tree = {"a": A, "b": B}
    guarded = round_products(f)
    for transformed in (jax.jit(guarded), jax.vmap(guarded)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-6), transformed(tree, C), f(tree, C))
    grads = (jax.grad(lambda c, g=g: jnp.sum(g(tree, c)["x"]))(C) for g in (guarded, f))
    np.testing.assert_allclose(*grads, rtol=1e-6)
