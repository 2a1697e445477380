"""Numbers in [-1, 1] as 8 bits: the maps between codes and values.

Each map has ``encode(z, r)`` and ``decode(codes)``. ``r - 8``, in 65536ths, says when a value between two neighbours
goes to the upper one: where the share of the way that it has come is more than that. So `HALF` rounds to the nearest,
and `random_r` rounds stochastically: the expected value is then z itself. It stays away from 0 and 1 by more than a
share may be inexact.

`CubicSigned` and `CubicUnsigned` compand, as telephones do: the code k stands for k^3, on straight lines between the
powers of two, over what the last code stands for. Each power of two begins a segment, eight times as far up as the
one before it and of twice as many values, evenly spaced:

    k        1   2   3   4     5     6     7     8  ...       64  ...      127
    cube     1   8  36  64   176   288   400   512  ...  262,144  ...  2,068,480

`UE5M3` is a float with five exponent bits, three mantissa bits and no sign, as in the microscaling formats.

Both directions are sums, shifts and products, without a table, so that they trace inside a kernel. A product is added
to something only where both are whole: a compiler may round such a sum once or twice, as it likes, and codes would
depend on the program.

Segments of twice as many values each are Dettmers, Lewis, Shleifer & Zettlemoyer 2022, arXiv:2110.02861, section 2.
There they are seven decades, and the values are the middles of intervals, so that -1 is none. The bits of a float
tell between which powers of eight it is, but not in which decade; and segments that end in a value leave no gap.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

STEP = 2**16
GUARD = 16
HALF = STEP // 2 + GUARD // 2


def random_r(bits: jax.Array) -> jax.Array:
    """A number in 16..65535, int32, from 32 random bits; less 8, its mean is that of 0..65535."""
    return ((bits >> 16) | GUARD).astype(jnp.int32)


class Code(Protocol):
    """A map between 8-bit codes and values in [-1, 1] or [0, 1].

    ``decode(encode(0, r)) == 0``, ``encode(decode(c), r) == c`` for every r in 16..65535, and decode is monotone.
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


class CubicSigned:
    """Cubes of -127..127 as int8; -128 is no code."""

    dtype = jnp.dtype(jnp.int8)
    one = 127

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [-1, 1]."""
        k = _number(jnp.abs(z), r, self.one, least=0)
        return jnp.where(_bits(z) < 0, -k, k).astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        return _value(codes, self.one)


class CubicUnsigned:
    """Cubes of 0 and 2..255 as uint8; 1 is no code, for 2 is eight times as much. Nothing above 0 becomes 0."""

    dtype = jnp.dtype(jnp.uint8)
    one = 255

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [0, 1]."""
        k = _number(z, r, self.one, least=2)
        return jnp.minimum(k, _bits(z)).astype(jnp.uint8)  # the bits of 0 are 0, else they are more than any code

    def encode_root(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of the root of each value in [0, 1].

        The root is taken of what is between 1 and the square of the least value: compilers need no care for others.
        """
        k = _number(jnp.sqrt(jnp.maximum(jnp.where(z < 1, z, 1), LEAST_SQUARE)), r, self.one, least=2, inside=True)
        return jnp.minimum(k, _bits(z)).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        return _value(codes, self.one)


class UE5M3:
    """The upper bits of a float32 above 0: 8 values to each power of two, from 2.9e-10 to 1.

    A code is the int8 with the bits of c in 0..255, so that its dtype tells it from `CubicUnsigned`. 0 is 0, else the
    float32 whose bits are (c + 761) 2^20. Nothing above 0 becomes 0.
    """

    dtype = jnp.dtype(jnp.int8)
    one = -1

    def encode(self, z: jax.Array, r: jax.Array | int) -> jax.Array:
        """The code of each value in [0, 1]."""
        code = ((_bits(z) + ((STEP + GUARD // 2 - r) << 4)) >> 20) - 761
        return jnp.where(z > 0, jnp.clip(code, 1, 255), 0).astype(jnp.int8)  # 255 wraps to -1

    def decode(self, codes: jax.Array) -> jax.Array:
        """The value of each code, float32."""
        c = codes.astype(jnp.int32) & 255
        return jnp.where(c > 0, _float((c + 761) << 20), 0)


def _cube(k: int) -> int:
    """What k stands for: the value at k of the line from n^3 to (2 n)^3, where n is the power of two in k."""
    n = 1 << (k.bit_length() - 1)
    return (7 * k - 6 * n) * n * n


def _value(codes: jax.Array, one: int) -> jax.Array:
    """What each code stands for, over what `one` does, with its sign: whole numbers times one that is rounded.

    That one is no factor by itself: XLA would multiply a block's scale by it first, and 1 would not give the scale.
    """
    k = codes.astype(jnp.float32)
    n = _float(_bits(k) & -(2**23))  # sign and exponent: the power of two in k; of 0 it is 0
    return (7 * k - 6 * n) * (n * n * (1 / _cube(one)))


def _number(z: jax.Array, r: jax.Array | int, one: int, least: int, inside: bool = False) -> jax.Array:
    """The code of a neighbour of `z` in [0, 1]: the upper one where z has come more than r - 8.

    In a segment a number's place among the codes is a line, `slope` z + `offset`, in 65536ths. What is below the code
    `least`, a power of two, counts as that; if it is 0, there is one segment more, from 0 to the code 1. `inside`: z is
    certainly between what `least` stands for and 1.
    """
    first = _first(one, least)
    if not inside:
        z = jnp.where(z < 1, z, 1)  # not NaN, either
    clipped = z if inside else jnp.maximum(z, first)
    octaves = (_bits(clipped) - int(first.view(np.int32))) >> 23
    segment = (octaves * 21846) >> 16  # a third of them
    e = segment + (least.bit_length() - 1)  # in which the codes are from 2^e on
    unit = 1 / _cube(one)
    slope = STEP / unit / 7 * _float((127 - 2 * e) << 23)
    offset = round(STEP * 128 * 6 / 7) >> (7 - e)
    if not least:
        clipped, slope, offset = z, jnp.where(segment > 0, slope, STEP / unit), jnp.where(segment > 0, offset, 0)
    upwards = offset + (STEP + GUARD // 2 + 1) - r  # 1, for both terms of a place are cut to whole numbers
    return ((clipped * slope).astype(jnp.int32) + upwards) >> 16


def _first(one: int, least: int) -> np.float32:
    """What the code `least` stands for; for 0 an eighth of what 1 does, where the segment before it would begin."""
    return np.float32((_cube(least) if least else 1 / 8) / _cube(one))


def _least_square() -> np.float32:
    """The smallest float32 of which the root is at least what the code 2 stands for."""
    square = _first(255, 2) ** 2
    while np.sqrt(square) >= _first(255, 2):
        square = np.nextafter(square, np.float32(0))
    return np.nextafter(square, np.float32(1))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


LEAST_SQUARE = float(_least_square())
