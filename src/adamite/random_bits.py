"""Random bits from a counter, for stochastic rounding: no key in the state, no order of drawing.

The bits of an element are a hash of (seed, step, leaf, element), in 32-bit integer arithmetic. An element gets the same
bits on every replica and on any mesh, two runs are equal to the bit, and a kernel can compute them on the spot.
Inside ``shard_map`` and ``pmap`` an element's number is that in its shard; members of a ``vmap`` share their bits.

The hash is ``lowbias32`` (Wellons 2018, Hash Prospector): a bijection of the 32-bit integers in which each bit of the
input flips each bit of the output in almost half of all cases. It is no cryptography, and need not be.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Bits = Callable[[], jax.Array]
"""Gives 32 random bits for each element of an array, a uint32, to those who ask."""


def fold(key: jax.typing.ArrayLike, number: jax.typing.ArrayLike) -> jax.Array:
    """A new key from a key and a number: both of shape () and taken modulo 2^32. ``fold(fold(seed, step), leaf)``."""
    return _mix(_mix(_uint32(key)) + _uint32(number))


def random_bits(key: jax.Array, index: jax.Array) -> jax.Array:
    """32 random bits for each element.

    Args:
        key: uint32 of shape (), from `fold`.
        index: the elements' numbers in their array, uint32 of any shape.

    Returns:
        uint32 of the shape of `index`.
    """
    return _mix(index + key)


def uniform(bits: jax.Array, count: int) -> jax.Array:
    """The upper `count` of 32 random bits as a float32 in [0, 1)."""
    return (bits >> (32 - count)).astype(jnp.float32) * 2.0**-count


def element_index(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> jax.Array:
    """The number of each element in row-major order, or by other strides, modulo 2^32: uint32 of that shape."""
    if strides is None:
        strides = row_major(shape)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    return index


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart the neighbours along each axis are, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _uint32(x: jax.typing.ArrayLike) -> jax.Array:
    return jnp.uint32(x % 2**32) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32)
