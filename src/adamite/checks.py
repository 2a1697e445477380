"""Arguments are checked where they come in: each helper returns the value to use, or raises naming the argument.

`ValueError` where the value is not allowed, `TypeError` where it is the wrong kind of thing. Traced values are checked
for shape and kind only; their numbers are not known yet.
"""

import contextlib
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamite.numerics import as_array, cast, is_traced, wide_dtype
from adamite.paths import leaves_with_path, map_with_path


class RefusedError(ValueError):
    """What was read is damaged, or not what was asked for. Nothing of it was used."""


@contextlib.contextmanager
def needed(by: str, package: str) -> Iterator[None]:
    """Where an import inside fails, says which package to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{by} needs {package} ({error}): pip install --upgrade {package}") from error


def decay_rate(name: str, value: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """A number in [0, 1)."""
    return _number(name, value, "lie in [0, 1)", lambda x: 0 <= x < 1)


def non_negative(name: str, value: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """A finite number >= 0."""
    return _number(name, value, "be finite and >= 0", lambda x: 0 <= x < math.inf)


def positive(name: str, value: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """A finite number > 0."""
    return _number(name, value, "be finite and > 0", lambda x: 0 < x < math.inf)


def at_least(name: str, value: jax.typing.ArrayLike, lowest: float) -> jax.typing.ArrayLike:
    """A finite number >= `lowest`."""
    return _number(name, value, f"be finite and >= {lowest}", lambda x: lowest <= x < math.inf)


def non_negative_or_schedule(name: str, value: Any) -> Any:
    """A finite number >= 0, or a function from the step count to one."""
    return _or_schedule(non_negative, name, value)


def decay_rate_or_schedule(name: str, value: Any) -> Any:
    """A number in [0, 1), or a function from the step count to one."""
    return _or_schedule(decay_rate, name, value)


def learning_rate(value: Any) -> Any:
    """A finite number >= 0 or a schedule; says what to do instead of a negative one."""
    try:
        return non_negative_or_schedule("learning_rate", value)
    except ValueError as error:
        raise ValueError(f"{error} (to maximize, negate the gradients)") from None


def flag(name: str, value: bool) -> bool:
    """True or False, nothing else."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")
    return bool(value)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """One of the strings in `allowed`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {_describe(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r:.80}")
    return value


def axis_name(value: Any) -> Any:
    """None, the name of an axis, or a tuple of some."""
    names = value if isinstance(value, tuple) else () if value is None else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be None, a string or a tuple of strings, got {_describe(value)}")
    return names


def path(name: str, value: Any) -> str:
    """The name of a file or a folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be the name of a file or folder, got {_describe(value)}")
    return os.fspath(value)


def strings(name: str, value: Any) -> set[str]:
    """A string, or several."""
    found: list[Any] = [value] if isinstance(value, str) else [*value] if isinstance(value, Collection) else [None]
    if not all(isinstance(one, str) for one in found):
        raise TypeError(f"{name} must be a string or several, got {_describe(value)}")
    return set(found)


def function(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {_describe(value)}")
    return value


def floating_dtype(name: str, value: jax.typing.DTypeLike | None) -> jnp.dtype | None:
    """None, or a real floating dtype of at least 16 bits."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{name} must be None or a floating dtype, got {_describe(value)}") from None
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ValueError(f"{name} must be None or a floating dtype of at least 16 bits, got {dtype.name}")
    return dtype


def mask(value: Any) -> Any:
    """None, a tree of booleans, or a function from the parameters to one."""
    if value is None or callable(value):
        return value
    for path, leaf in leaves_with_path(value):
        if not (isinstance(leaf, (bool, np.bool_)) or callable(leaf)):
            where = f"mask{jax.tree_util.keystr(path)}"
            raise TypeError(f"mask must be None, a tree of booleans or a function; {where} is {_describe(leaf)}")
    return value


def differentiable(tree: Any, name: str) -> None:
    """Every leaf is a floating or complex array, or a Python number; refuse others with their path."""
    if all(map(is_differentiable, jax.tree.leaves(tree))):  # without paths, which take most of the time
        return
    for path, leaf in leaves_with_path(tree):
        if is_differentiable(leaf):
            continue
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{where} must be a floating or complex array, got {_describe(leaf)}")
        raise TypeError(
            f"{where} has dtype {leaf.dtype.name}, but only floating and complex arrays can be optimized: "
            "leave it out with optax.masked, optax.partition or your framework's own filter"
        )


def transformation(name: str, value: Any) -> Any:
    """A gradient transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"{name} must be a gradient transformation, got {_describe(value)}")
    return value


def abstract(tree: Any, name: str) -> Any:
    """The shapes and dtypes of a tree whose leaves have them, or are Python numbers; refuse others with their path."""

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, (int, float, complex)):
            leaf = jax.eval_shape(as_array, leaf)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} must have a shape and a dtype, got {_describe(leaf)}")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return map_with_path(one, tree)


def states(state: Any, count: int) -> tuple[Any, ...]:
    """A tuple of so many parts' states."""
    if not isinstance(state, (tuple, list)) or len(state) != count:
        got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
        raise TypeError(
            f"state must be a tuple of the {count} parts' states, got {got}: "
            "is it what this optimizer's init gave, in update(updates, state, params)?"
        )
    return tuple(state)


def whole(name: str, value: Any, *, lowest: int | None = None) -> int:
    """A whole number, not below `lowest`: of Python, or an array of shape () of NumPy or JAX."""
    must = f"{name} must be a whole number" + (f" >= {lowest}" if lowest is not None else "")
    if is_traced(value):
        raise TypeError(f"{must} that is known outside of jit, got a traced array")
    array = (
        isinstance(value, (jax.Array, np.ndarray)) and value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
    )
    if not (array or isinstance(value, numbers.Integral)) or isinstance(value, bool):
        raise TypeError(f"{must}, got {_describe(value)}")
    number = int(value)
    if lowest is not None and number < lowest:
        raise ValueError(f"{must}, got {number}")
    return number


def seed(value: Any) -> int | None:
    """None or a whole number."""
    return None if value is None else whole("seed", value)


def power_of_two(name: str, value: Any) -> int:
    """1, 2, 4, 8, ..."""
    number = whole(name, value, lowest=1)
    if number.bit_count() != 1:
        raise ValueError(f"{name} must be a power of two, got {number}")
    return number


def _or_schedule(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    if callable(value):
        return value
    try:
        return check(name, value)
    except TypeError as error:
        raise TypeError(f"{error}, or a schedule (a function of the step count)") from None


def _number(name: str, value: Any, must: str, allowed: Callable[[float], bool]) -> jax.typing.ArrayLike:
    if isinstance(value, np.ndarray) and value.shape == () and _is_real(value.dtype):
        value = value[()]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's, too: their width is no wish
        value = float(value)
        if not allowed(value):
            raise ValueError(f"{name} must {must}, got {value}")
        return value
    if not isinstance(value, (jax.Array, np.ndarray)) or not _is_real(value.dtype):
        raise TypeError(f"{name} must be a number or an array of shape (), got {_describe(value)}")
    if value.shape != ():
        raise ValueError(f"{name} must be a number or an array of shape (), got shape {value.shape}")
    if not is_traced(value) and not allowed(float(value)):
        hint = ""
        if value.dtype.itemsize < 4:
            hint = (
                ", to which it was rounded before it came here: give it in float32, "
                "as optax.inject_hyperparams does with hyperparam_dtype=jnp.float32"
            )
        raise ValueError(f"{name} must {must}, got {float(value)} of dtype {value.dtype.name}{hint}")
    return cast(jnp.asarray(value), wide_dtype(value.dtype))  # a weakly typed number stays that


def is_differentiable(leaf: Any) -> bool:
    """Whether it is a floating or complex array, or a Python number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
    return jnp.issubdtype(dtype, jnp.inexact)


def _is_real(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _describe(value: Any) -> str:
    return "None" if value is None else f"{value!r:.80} of type {type(value).__name__}"
