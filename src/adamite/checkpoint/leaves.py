"""The leaves of a tree: what is told of one, and the array that stands for it in Orbax's files.

Arrays of JAX and of NumPy stand for themselves, random keys are their data, numbers are arrays of shape (). Arrays
without elements, which Orbax refuses, are only told of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from adamite.checkpoint.hashing import grid
from adamite.checks import RefusedError
from adamite.numerics import cast, is_traced
from adamite.paths import leaves_with_path

KINDS = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}
"""Numbers of Python, and the dtypes that are of their kind."""


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
        ValueError: a whole number of Python has more than 64 bits.
    """
    found = {keystr(path): leaf for path, leaf in leaves_with_path(tree)}
    for path, leaf in found.items():
        if is_traced(leaf):
            raise TypeError(f"{name}{path} must be an array outside of jit, got a traced one")
        if not (is_number(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))):
            raise TypeError(
                f"{name}{path} must be an array or a number, got {leaf!r:.80} of type {type(leaf).__name__}"
            )
        if type(leaf) is int and not -(2**63) <= leaf < 2**63:
            raise ValueError(f"{name}{path} must be a whole number of 64 bits, got {leaf!r:.80}")
    return found


def is_number(leaf: Any) -> bool:
    """Whether it is a number of Python."""
    return isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic)


def describe(leaf: Any) -> Leaf:
    """An array, abstract or not, or a number."""
    if is_number(leaf):
        return Leaf((), type(leaf).__name__, (), 0)
    if is_on_host(leaf):
        return Leaf(leaf.shape, leaf.dtype.name, grid(leaf), 0)
    devices = leaf.sharding.num_devices if getattr(leaf, "sharding", None) else 1
    if _is_key(leaf):
        shape = jax.eval_shape(jax.random.key_data, leaf).shape
        return Leaf(shape, str(leaf.dtype), grid(leaf) + (1,) * (len(shape) - len(leaf.shape)), devices)
    return Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name, grid(leaf), devices)


def array(leaf: Any) -> Any:
    """What stands for a leaf in Orbax's files: an array of JAX or NumPy."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if is_number(leaf) or is_on_host(leaf):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def target(leaf: Any) -> Any:
    """Such an array, abstract."""
    if is_number(leaf) or is_on_host(leaf):
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
    """The leaf that an array stands for: of JAX or NumPy."""
    return jax.random.wrap_key_data(x, impl=_implementation(leaf)) if _is_key(leaf) else x


def retyped(leaf: Any, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """An abstract array in place of a leaf: on the host if that is, or where a sharding says."""
    return np.empty(shape, dtype) if is_on_host(leaf) else jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def scalar(saved: Leaf, leaf: Any) -> Any:
    """An abstract scalar as it was saved, if `leaf` is one of the same kind, and one of the two a number; else None."""
    dtype = np.dtype(bool) if saved.dtype == "bool" else dtype_of(saved.dtype)
    is_pythons = saved.devices == 0 and saved.dtype in (kind.__name__ for kind in KINDS)
    if dtype is None or saved.shape or getattr(leaf, "shape", ()) or not (is_pythons or is_number(leaf)):
        return None
    now = np.asarray(leaf).dtype if is_number(leaf) else leaf.dtype
    same = any(jnp.issubdtype(dtype, kind) and jnp.issubdtype(now, kind) for kind in KINDS.values())
    return np.empty((), dtype) if same else None


def recast(leaf: Any, saved: Leaf) -> Any:
    """An abstract array in the dtype that was saved."""
    return retyped(leaf, leaf.shape, dtype_of(saved.dtype), getattr(leaf, "sharding", None))


def blank(leaf: Any) -> Any:
    """An array in place of an abstract one."""
    return jnp.zeros(leaf.shape, leaf.dtype)


def as_like(x: Any, leaf: Any, path: str) -> Any:
    """An array as a leaf of that type: a number of Python or NumPy, an array of NumPy or of JAX, in its dtype, there.

    Raises:
        RefusedError: a number is too large for the leaf's dtype.
    """
    if is_number(leaf):
        return type(leaf)(x.item())
    if _is_key(leaf):
        return x
    if isinstance(x, np.ndarray) and not x.shape and x.dtype != leaf.dtype and not fits(x, leaf.dtype):
        raise RefusedError(f"{path}: {x.item()} was saved, which does not fit {leaf.dtype.name}")
    if is_on_host(leaf):
        x = np.asarray(x, leaf.dtype)
        return x[()] if isinstance(leaf, np.generic) else x
    sharding = getattr(leaf, "sharding", None)
    if isinstance(x, np.ndarray):
        return jax.device_put(x.astype(leaf.dtype), sharding)
    x = cast(x, leaf.dtype)
    return x if sharding is None or x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(x, sharding)


def fits(x: np.ndarray, dtype: Any) -> bool:
    """Whether a scalar is in the range of a dtype of its kind. NaN and infinities are in any."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min <= x.item() <= jnp.iinfo(dtype).max
    with np.errstate(over="ignore"):
        return bool(np.isfinite(x.astype(dtype))) or not np.isfinite(x)


def dtype_of(name: str) -> Any:
    """The dtype of a name that was read; None if there is none, or its elements are not of a fixed size."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return None
    return dtype if jnp.issubdtype(dtype, jnp.number) else None


def is_floating(dtype: str) -> bool:
    """Whether a dtype of that name holds real numbers."""
    found = dtype_of(dtype)
    return found is not None and jnp.issubdtype(found, jnp.floating)


def is_on_host(leaf: Any) -> bool:
    """Whether it is NumPy's."""
    return isinstance(leaf, (np.ndarray, np.generic))


def _is_key(leaf: Any) -> bool:
    return not is_number(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(leaf: Any) -> Any:
    """That of random keys, which may be abstract: JAX tells it of arrays alone, traced ones among them."""
    found: list[Any] = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), leaf)
    return found[0]
