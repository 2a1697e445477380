"""Numbers in [-1, 1] as 8 bits: the maps between codes and values.

Each map has ``encode(z, r)`` and ``decode(codes)``. ``r``, in 4096ths, says when a value between two neighbours goes to
the upper one: where the share of the way that it has come is more than r. So `HALF` rounds to the nearest, and
`random_r` rounds stochastically: the expected value is then z itself.

Both directions are comparisons, shifts and products, without a table, so that they trace inside a kernel. No product is
added to anything: a compiler may round such a sum once or twice, as it likes, and codes would depend on the program.

Dynamic codes: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, arXiv:2110.02861, section 2. UE5M3 is a float with five
exponent bits, three mantissa bits and no sign, as in the microscaling formats.
"""

import functools
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
        return jnp.maximum(jnp.where(_bits(z) < 0, -k, k), -127).astype(jnp.int8)  # 128 wraps to -128

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        d = codes.astype(jnp.int32)  # of which -128, like all that stand for less than 0, has the sign -1
        return jnp.sign(d).astype(jnp.float32) * _dynamic_value(jnp.maximum(jnp.abs(d), 1), lowest=0, top=6, last=-1.0)


class DynamicUnsigned:
    """Seven decades above 0, each with twice as many values as the one below it: 2, 4, 8, ... 128.

    A code is the uint8 c. 0 is 0; 255 is 1; else, with k = c + 1, e = floor(log2 k) in 1..7 and j = k - 2^e,
    value = 10^(e - 7) (0.1 + 0.9 (j + 1/2) / 2^e). Nothing above 0 becomes 0.
    """

    dtype = jnp.dtype(jnp.uint8)
    one = 255

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [0, 1]."""
        c = _dynamic_code(z, r, lowest=1, top=7)
        return jnp.where(z > 0, jnp.maximum(c, 1), 0).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        c = codes.astype(jnp.int32)
        return jnp.where(c > 0, _dynamic_value(jnp.maximum(c + 1, 2), lowest=1, top=7, last=1.0), 0)


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


def _dynamic_value(k: jax.Array, lowest: int, top: int, last: float) -> jax.Array:
    """The value that `k` in 2^lowest..2^(top + 1) numbers from below; that of 2^(top + 1) is `last`.

    0.1 + 0.9 (j + 1/2) / n is the whole number 18 k - (16 n - 9), divided by 20 n.
    """
    wide = k.astype(jnp.float32)
    decade = (_bits(wide) >> 23) - (127 + lowest)
    units = [10.0 ** (e - top) / 20 / 2**e for e in range(lowest, top + 1)] + [last / (2 * 2 ** (top + 1) + 9)]
    unit = jnp.asarray(units[0])
    for number, other in enumerate(units[1:], start=1):
        unit = jnp.where(decade >= number, other, unit)
    n = (2**lowest << decade).astype(jnp.float32)
    return (18 * wide - (16 * n - 9)) * unit


def _dynamic_code(z: jax.Array, r: jax.Array | int, lowest: int, top: int) -> jax.Array:
    """The number of a neighbour of `z` in [0, 1], counted from 2^lowest: the upper one where z has come more than r.

    Between neighbours the place of a number is linear: their number and the share that it has come, in 2^-16ths.
    """
    z = jnp.where(z < 1, z, 1)  # not NaN, either
    parts = _parts(lowest, top)
    lines = list(parts[0][1:])
    for start, *line in parts[1:]:
        lines = [jnp.where(z >= start, new, old) for new, old in zip(line, lines, strict=True)]
    slope, offset, across_slope, across_offset = lines
    inside = (z * slope).astype(jnp.int32) + offset
    across = (z * across_slope).astype(jnp.int32) + across_offset
    return (jnp.minimum(inside, across) - (r << 4)) >> 16


@functools.cache
def _parts(lowest: int, top: int) -> list[tuple[float, float, int, float, int]]:
    """The line through (value(k), 2^16 (k - lowest)) in parts: where each begins, and slopes and offsets of two lines.

    A decade's first line is through its own values, the second one from its last value to the next decade's first; that
    is flatter, so the lower line is the right one. Beyond the last decade's last value the way to 1 is steeper: a part
    of its own. All are 2^16 - 1 higher, so that a share of more than r, once r is taken away, reaches the next number.
    """

    def value(k: int) -> float:
        e = k.bit_length() - 1
        if e in (-1, top + 1):
            return min(1.0, float(k))
        return 10.0 ** (e - top) * (0.1 + 0.9 * (k - 2**e + 0.5) / 2**e)

    def line(k: int, last: int) -> tuple[float, int]:
        slope = STEP * (last - k) / (value(last) - value(k))
        return slope, round(STEP * (k - lowest + 1) - 0.5 - slope * value(k))  # products are cut to whole numbers

    parts = []
    for e in range(lowest, top + 1):
        n = 2**e
        inside = line(n - (e == 0), 2 * n - 1)
        parts.append((value(n), *inside, *(line(2 * n - 1, 2 * n) if e < top else inside)))
    beyond = line(2 * 2**top - 1, 2 * 2**top)
    return [*parts, (value(2 * 2**top - 1), *beyond, *beyond)]


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
