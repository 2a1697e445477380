"""Equality to the last bit, and of types."""

from typing import Any

import jax
import numpy as np
import optax


def bits(x: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Same structure, dtypes, shapes and bits, leaf by leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        where = jax.tree_util.keystr(path)
        assert np.asarray(a).dtype == np.asarray(b).dtype, where
        assert np.shape(a) == np.shape(b), where
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=where)


def types(tree: Any) -> Any:
    """What jit knows an array by."""
    return jax.tree.map(lambda x: (x.shape, x.dtype.name, x.weak_type), tree)


def place(x: jax.Array) -> int:
    """Where in memory an array of one device is."""
    return x.unsafe_buffer_pointer()


def trajectory(tx: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """All updates and states, and the last parameters, of a jitted scan over stacked gradients."""

    @jax.jit
    def run(params: Any, state: Any, gradients: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), (updates, state)

        return jax.lax.scan(step, (params, state), gradients)

    return run(params, tx.init(params), gradients)
