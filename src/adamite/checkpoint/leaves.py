"""The leaves of a tree: what is told of one, and the array that stands for it in Orbax's files.

Arrays of JAX and of NumPy stand for themselves, random keys are their data, numbers are arrays of shape (). Arrays
without elements, which Orbax refuses, are only told of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from adamite.checkpoint.hashing import grid


class Leaf(NamedTuple):
    """An array, without its numbers."""

    shape: tuple[int, ...]
    dtype: str
    """NumPy's name for it; such as "key<fry>" for random keys, whose shape is that of their data; "int", "float" or
    "bool" for numbers of Python."""
    grid: tuple[int, ...]
    """Into how many parts each axis was cut."""
    devices: int
    """On how many it was; 0 for what is not JAX's."""


def leaves_of(tree: Any, name: str = "tree") -> dict[str, Any]:
    """The arrays and numbers of a tree, by path.

    Raises:
        TypeError: a leaf is something else.
    """
    found = {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}
    for path, leaf in found.items():
        if not (isinstance(leaf, (bool, int, float)) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))):
            raise TypeError(
                f"{name}{path} must be an array or a number, got {leaf!r:.80} of type {type(leaf).__name__}"
            )
    return found


def describe(leaf: Any) -> Leaf:
    """An array, abstract or not, or a number."""
    if isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic):
        return Leaf((), type(leaf).__name__, (), 0)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return Leaf(leaf.shape, leaf.dtype.name, grid(leaf), 0)
    devices = leaf.sharding.num_devices if getattr(leaf, "sharding", None) else 1
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        shape = jax.eval_shape(jax.random.key_data, leaf).shape
        return Leaf(shape, str(leaf.dtype), grid(leaf) + (1,) * (len(shape) - len(leaf.shape)), devices)
    return Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name, grid(leaf), devices)


def array(leaf: Any) -> Any:
    """What stands for a leaf in Orbax's files: an array of JAX or NumPy."""
    if isinstance(leaf, (bool, int, float, np.generic)):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def target(leaf: Any) -> Any:
    """Such an array, abstract."""
    if isinstance(leaf, (bool, int, float, np.generic, np.ndarray)):
        return np.empty_like(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def empty(target: Any) -> Any:
    """An array without elements."""
    if isinstance(target, np.ndarray):
        return target
    return jax.device_put(jnp.zeros(target.shape, target.dtype), target.sharding)


def restored(x: Any, leaf: Any) -> Any:
    """The leaf that an array stands for."""
    if isinstance(leaf, (bool, int, float, np.generic)):
        return type(leaf)(x.item())
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x


def cast(x: Any, leaf: Any) -> Any:
    """An array in the dtype of a leaf."""
    return x.astype(leaf.dtype) if getattr(x, "dtype", None) != getattr(leaf, "dtype", None) else x


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
