"""The arithmetic that every algorithm shares: moving averages, bias correction, and the width they are computed in.

    update_moment    m <- (1 - decay) g^order + decay m
    bias_correction  m / (1 - decay^count)

Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1 and section 3. Operations and their order are optax's, so that float32
results are optax's to the bit. Both functions take trees; an array is a tree of one leaf.
"""

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_none(x: Any) -> bool:
    """True for None; as `is_leaf` it lets an absent gradient keep its place in a tree."""
    return x is None


def is_traced(x: Any) -> bool:
    """True for an array inside of jit, vmap, grad and the like, whose numbers are not known yet."""
    return isinstance(x, Tracer)


@functools.cache
def wide_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which numbers of `dtype` are computed: at least float32."""
    dtype = jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return dtype if wide else jnp.dtype(jnp.float32)


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` in `dtype`; itself if it has that dtype already."""
    return x if x.dtype == dtype else x.astype(dtype)


def as_array(x: Any) -> jax.Array:
    """`x` as a JAX array; a Python number becomes a float32 (or complex64) scalar, whatever the default dtype is."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, (int, float, complex)):
        return jnp.asarray(x, jnp.complex64 if isinstance(x, complex) else jnp.float32)
    return jnp.asarray(x)


def widen(x: Any) -> jax.Array:
    """`x` as an array of at least float32."""
    x = as_array(x)
    return cast(x, wide_dtype(x.dtype))


def update_dtype(g: Any, p: Any = None) -> jnp.dtype:
    """The dtype of an update: the wider of the gradient's and the weight's, so that it holds what the weight can.

    Args:
        g: the gradient, an array or a number.
        p: the weight, the like. None: it is not known, and the update has at least float32.
    """
    g = as_array(g)
    return wide_dtype(g.dtype) if p is None else jnp.promote_types(g.dtype, as_array(p).dtype)


def as_wide_as(x: jax.Array, number: Any) -> Any:
    """A number that does not widen `x`: with 64-bit types enabled, a power of a decay is a float64.

    Python numbers and JAX's weakly typed ones do not widen anything, and stay as they are.
    """
    strong = hasattr(number, "dtype") and not getattr(number, "weak_type", False)
    return cast(jnp.asarray(number), x.real.dtype) if strong and jnp.issubdtype(number.dtype, jnp.floating) else number


def update_moment(updates: Any, moments: Any, decay: jax.typing.ArrayLike, order: int) -> Any:
    """Exponential moving average of the `order`-th power of the gradients: ``(1 - decay) g^order + decay m``.

    Args:
        updates: tree of gradients g, any shapes; where a gradient is None, so is the result.
        moments: tree of the same shapes, the averages so far.
        decay: in [0, 1): the share of the old average that is kept at each step.
        order: 1 or 2. For complex g the second power is ``|g|^2``, a real number.

    Returns:
        Tree of the new averages.

    Example:
        >>> update_moment(jnp.array([1.0, -2.0]), jnp.zeros(2), decay=0.5, order=2).tolist()
        [0.5, 2.0]
    """

    def one(g: Any, m: Any) -> Any:
        return None if g is None else (1 - decay) * _power(g, order) + decay * m

    return jax.tree.map(one, updates, moments, is_leaf=is_none)


def bias_correction(moment: Any, decay: jax.typing.ArrayLike, count: jax.typing.ArrayLike) -> Any:
    """Undo the pull of the zeros that a moving average started from: ``m / (1 - decay^count)``.

    Args:
        moment: tree of moving averages, as `update_moment` gives them.
        decay: in [0, 1): the decay of that average.
        count: number of gradients averaged so far, an int32 of shape (), at least 1.

    Returns:
        Tree of the corrected averages, dtypes as in `moment`.

    Example:
        >>> m = update_moment(jnp.array(3.0), jnp.array(0.0), decay=0.9, order=1)
        >>> print(f"{m:.1f} {bias_correction(m, decay=0.9, count=1):.1f}")
        0.3 3.0
    """
    correction = 1 - power(decay, count)
    return jax.tree.map(lambda m: m / cast(jnp.asarray(correction), m.dtype), moment)


@functools.partial(jax.jit, inline=True)
def power(decay: jax.typing.ArrayLike, count: jax.typing.ArrayLike) -> jax.Array:
    """``decay^count``, one program for all counts.

    JAX unrolls ``decay**count`` for a count that is known, as it is in eager code, and would compile at every step.
    """
    return jnp.asarray(decay**count)


def total_weight(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - decay^count``, the weight of all gradients in a moving average, to the last digits.

    In float32 ``1 - 0.999**count`` is off by 1e-5, as optax has it; here by 1e-7.
    """
    if isinstance(decay, float):
        return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))
    return -jnp.expm1(count * jnp.log1p(decay - 1))


def abs_sq(x: jax.Array) -> jax.Array:
    """``|x|^2``, elementwise: a real number for complex x, too."""
    return (x.conj() * x).real


def unfused(x: jax.Array) -> jax.Array:
    """`x`, rounded before it is added to anything: no compiler fuses the product that it is with a sum."""
    with constants():
        return jnp.where(jnp.isfinite(x), x, 2 * x)


_CONSTANTS = "constants"


def constants() -> contextlib.AbstractContextManager[Any]:
    """Inside, floats belong to a format and are nobody's to set: kernels are compiled for these very numbers."""
    return jax.named_scope(_CONSTANTS)


def are_constants(eqn: Any) -> bool:
    """Whether an equation of a jaxpr was traced inside of `constants`."""
    return _CONSTANTS in str(eqn.source_info.name_stack).split("/")


def _power(g: Any, order: int) -> jax.Array:
    return abs_sq(g) if order == 2 and jnp.iscomplexobj(g) else g**order


def over_devices(total: Any, part: jax.Array, axes: tuple[str, ...]) -> Any:
    """`total`, of what a device has of a leaf, summed over the axes of `axes` that cut the leaf.

    Inside of shard_map arrays know over which axes they differ, unless ``check_vma=False``; then, and in pmap, all of
    `axes` cut every leaf.
    """

    def differs(x: jax.Array, axis: str) -> bool:
        return axis in jax.typeof(x).manual_axis_type.varying

    cutting = tuple(axis for axis in axes if differs(part, axis) or not differs(jax.lax.axis_index(axis), axis))
    return jax.lax.psum(total, cutting) if cutting else total
