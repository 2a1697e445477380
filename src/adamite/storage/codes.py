"""Numbers in [-1, 1] as 8 bits: the maps between codes and values.

Each map has ``encode(z, r)`` and ``decode(codes)``. ``r``, in 4096ths, says when a value between two neighbours goes to
the upper one: where the share of the way that it has come is more than r. So `HALF` rounds to the nearest, and
`random_r` rounds stochastically: the expected value is then z itself.

Both directions are comparisons, shifts and products, without a table, so that they trace inside a kernel. No product is
added to anything: a compiler may round such a sum once or twice, as it likes, and codes would depend on the program.

Dynamic codes: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, arXiv:2110.02861, section 2. UE5M3 is a float with five
exponent bits, three mantissa bits and no sign, as in the microscaling formats.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

HALF = 2048
STEP = 2**16


def random_r(bits: jax.Array) -> jax.Array:
    """An odd number in 1..4095, int32, from 32 random bits: never so near the ends that a code's value leaves it."""
    return ((bits >> 20) | 1).astype(jnp.int32)


class Code(Protocol):
    """A map between 8-bit codes and values in [-1, 1] or [0, 1].

    ``decode(encode(0, r)) == 0``, ``encode(decode(c), r) == c`` for every r in 1..4095, and decode is monotone.
    """

    dtype: jnp.dtype
    one: int
    """The code of 1; that of 0 is 0."""

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        ...


class DynamicSigned:
    """Seven decades on either side of 0, each with twice as many values as the one below it: 1, 2, 4, ... 64.

    A code is the int8 d. 0 is 0; -128 stands for 1; else, with e = floor(log2 |d|) in 0..6 and j = |d| - 2^e,
    value = sign(d) 10^(e - 6) (0.1 + 0.9 (j + 1/2) / 2^e).
    """

    dtype = jnp.dtype(jnp.int8)
    one = -128

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [-1, 1]."""
        k = _dynamic_code(jnp.abs(z), r, lowest=0, top=6)
        return jnp.where(z < 0, -jnp.minimum(k, 127), k).astype(jnp.int8)  # 128 wraps to -128

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        d = codes.astype(jnp.int32)
        d = jnp.where(d == -128, 128, d)
        return jnp.sign(d).astype(jnp.float32) * _dynamic_value(jnp.abs(d), top=6)


class DynamicUnsigned:
    """Seven decades above 0, each with twice as many values as the one below it: 2, 4, 8, ... 128.

    A code is the uint8 c. 0 is 0; 255 is 1; else, with k = c + 1, e = floor(log2 k) in 1..7 and j = k - 2^e,
    value = 10^(e - 7) (0.1 + 0.9 (j + 1/2) / 2^e). Nothing above 0 becomes 0.
    """

    dtype = jnp.dtype(jnp.uint8)
    one = 255

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [0, 1]."""
        k = _dynamic_code(z, r, lowest=1, top=7)
        return jnp.where(z > 0, jnp.maximum(k, 2) - 1, 0).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        c = codes.astype(jnp.int32)
        return jnp.where(c > 0, _dynamic_value(c + 1, top=7), 0)


class UE5M3:
    """The upper bits of a float32 above 0: 8 values to each power of two, from 2.9e-10 to 1.

    A code is the int8 with the bits of c in 0..255, so that its dtype tells it from `DynamicUnsigned`. 0 is 0, else the
    float32 whose bits are (c + 761) 2^20. Nothing above 0 becomes 0.
    """

    dtype = jnp.dtype(jnp.int8)
    one = -1

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [0, 1]."""
        code = ((_bits(z) + ((4096 - r) << 8)) >> 20) - 761
        return jnp.where(z > 0, jnp.clip(code, 1, 255), 0).astype(jnp.int8)  # 255 wraps to -1

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        c = codes.astype(jnp.int32) & 255
        return jnp.where(c > 0, _float((c + 761) << 20), 0)


def _dynamic_value(k: jax.Array, top: int) -> jax.Array:
    """The value that `k` in 0..2^(top + 1) numbers from below: 0 for 0, 1 for 2^(top + 1).

    0.1 + 0.9 (j + 1/2) / n is the whole number 2 n + 18 j + 9, divided by 20 n.
    """
    e = (_bits(k.astype(jnp.float32)) >> 23) - 127
    n = 1 << jnp.maximum(e, 0)
    value = (18 * k - 16 * n + 9).astype(jnp.float32) * _of_decade(e, top, lambda e: 10.0 ** (e - top) / 20 / 2**e)
    return jnp.where(k == 0, 0.0, jnp.where(e > top, 1.0, value))


def _dynamic_code(z: jax.Array, r: jax.Array | int, lowest: int, top: int) -> jax.Array:
    """The k of a neighbour of `z` >= 0: the upper one where z has come more than the share r of the way to it.

    In whole numbers, 2^16 to a step. At the ends of a decade the way is another: 3/5 of a step to its first value (half
    a step, and half of the lower decade's, a fifth as long), 3 steps from its last one to the next decade, half a step
    from the very last to 1. Below the first value of the `lowest` decade the neighbours are 0 and that value.
    """
    e = jnp.full(z.shape, lowest, jnp.int32)
    for decade in range(lowest + 1, top + 1):
        e += z >= 10.0 ** (decade - 1 - top)
    n = 1 << e
    first = _of_decade(e, top, lambda e: round(STEP * (2 * 2**e + 9) / 18))
    halves = z * _of_decade(e, top, lambda e: 2 * STEP * 20 * 2**e / 18 * 10.0 ** (top - e))
    place = (halves.astype(jnp.int32) + 1) >> 1
    from_first = place - first
    below = jnp.clip(from_first >> 16, -1, n - 1)
    to_first = jnp.where(e == lowest, first, 3 * STEP // 5)
    beyond_last = jnp.where(e < top, 3 * STEP, STEP // 2)
    come = jnp.where(below < 0, from_first + to_first, from_first - (below << 16))
    way = jnp.where(below < 0, to_first, jnp.where(below < n - 1, STEP, beyond_last))
    up = (come << 12) > r * way
    return jnp.where((below < 0) & (e == lowest), n * up, n + below + up)


def _of_decade(e: jax.Array, top: int, constant: Callable[[int], float]) -> jax.Array:
    """The constant of each element's decade."""
    chosen = jnp.asarray(constant(0))
    for decade in range(1, top + 1):
        chosen = jnp.where(e >= decade, constant(decade), chosen)
    return chosen


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
