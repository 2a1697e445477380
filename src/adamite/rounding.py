"""How weights of 16 bits absorb an update that is finer than they are.

A bfloat16 has 8 significant bits: near 1 its neighbours are 1/128 apart, and an update of 1e-3, rounded to the nearest,
is lost, at every step. Let theta be where a step leads, in float32, and p' the weight that is kept of it:

    Nearest        p' is nearest to theta                               a small update is lost
    Stochastic     p' is one of theta's neighbours, its mean theta      kept on average
    Residual8      p' is nearest, and beside it stand 8 bits more       a weight of 16 bits, the last one stochastic
    Residual16     p' is nearest, and beside it stand 16 bits more      theta itself

p' is the weight that the model sees; p' and its residual together are the weight that the optimizer steps. A bfloat16
is the upper half of a float32. Residual16 is the lower half of theta's bits as a signed number: p' is theta rounded
half up, in integers, so that no tie is ambiguous. Residual8 is the upper half of that: it counts in 256ths of the
spacing at p'. A float16 is no half of a float32, so there Residual8 counts in float32.

Derivatives pass straight through: that of a rounded number is that of the number (Bengio et al. 2013,
arXiv:1308.3432), as it is for a cast. The true one is 0 almost everywhere.

Stochastic rounding: Croci et al. 2022, "Stochastic rounding: implementation, error analysis and applications".
Residuals: FlashOptim, Databricks 2026, where they are rounded to the nearest and counted in 254ths. There a steady
update of 3.3 counts is always cut to 3. 256ths are exact in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from adamite import checks
from adamite.numerics import as_array, is_traced
from adamite.random_bits import Bits, uniform


class Rounding(Protocol):
    """How weights of one dtype of 16 bits take a step.

    For every theta in the range of that dtype, ``p, residual = round(theta, dtype, bits)`` is exactly a number of the
    dtype, in float32, and what stands beside it (None: nothing); ``weights(p, residual)`` is theta as exactly as this
    rounding has it. An infinite or NaN theta gives itself.
    """

    @property
    def seed(self) -> int | None:
        """Of the random bits; None if it needs none."""
        ...

    @property
    def residual_dtype(self) -> jnp.dtype | None:
        """What stands beside each weight, at first 0; None if nothing does."""
        ...

    def weights(self, p: jax.Array, residual: Any) -> jax.Array:
        """The weights that the optimizer steps, float32, from those that the model sees, of 16 bits."""
        ...

    def round(self, theta: jax.Array, dtype: jnp.dtype, bits: Bits) -> tuple[jax.Array, Any]:
        """The weights that the model sees, in float32, and the residual."""
        ...


@dataclasses.dataclass(frozen=True)
class Nearest:
    """To the nearest, ties to even."""

    seed = None
    residual_dtype = None

    def weights(self, p: jax.Array, residual: Any) -> jax.Array:
        """`p`."""
        del residual
        return p.astype(jnp.float32)

    def round(self, theta: jax.Array, dtype: jnp.dtype, bits: Bits) -> tuple[jax.Array, Any]:
        """The nearest."""
        del bits
        return nearest(theta, dtype), None


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """To one of the two neighbours, the nearer the likelier.

    Attributes:
        seed: of the random bits.
    """

    seed: int = 0
    residual_dtype = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", checks.whole("seed", self.seed))

    def weights(self, p: jax.Array, residual: Any) -> jax.Array:
        """`p`."""
        del residual
        return p.astype(jnp.float32)

    def round(self, theta: jax.Array, dtype: jnp.dtype, bits: Bits) -> tuple[jax.Array, Any]:
        """A neighbour."""
        return stochastic(theta, dtype, bits()), None


@dataclasses.dataclass(frozen=True)
class Residual8:
    """To the nearest, with the difference in 256ths of the spacing beside it, rounded stochastically.

    Attributes:
        seed: of the random bits.
    """

    seed: int = 0
    residual_dtype = jnp.dtype(jnp.int8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", checks.whole("seed", self.seed))

    def weights(self, p: jax.Array, residual: Any) -> jax.Array:
        """`p` and the counts beside it."""
        wide = p.astype(jnp.float32)
        if p.dtype == jnp.bfloat16:
            return straight_through(wide, _from_bits(_to_bits(wide) + (residual.astype(jnp.int32) << 8)))
        return wide + residual.astype(jnp.float32) * (spacing(wide, p.dtype) / 256)

    def round(self, theta: jax.Array, dtype: jnp.dtype, bits: Bits) -> tuple[jax.Array, Any]:
        """The nearest, and the counts from there."""
        if dtype == jnp.bfloat16:
            fine = (_to_bits(_clip(theta, dtype)) + (bits() >> 24).astype(jnp.int32)) & ~0xFF
            upper, finite = (fine + 0x8000) & ~0xFFFF, jnp.isfinite(theta)
            counts = jnp.where(finite, (fine - upper) >> 8, 0).astype(jnp.int8)
            return straight_through(theta, jnp.where(finite, _from_bits(upper), theta)), counts
        p = _half_up(theta, dtype)
        unit = spacing(p, dtype) / 256
        fine = p + jnp.floor((theta - p) / unit + uniform(bits(), 16)) * unit
        fine = jnp.where(jnp.isfinite(theta), fine, theta)
        p = _half_up(fine, dtype)  # 128 counts up is 128 down from the next
        counts = (fine - p) / (spacing(p, dtype) / 256)
        return p, jnp.where(jnp.isfinite(p), jnp.clip(counts, -128, 127), 0).astype(jnp.int8)


@dataclasses.dataclass(frozen=True)
class Residual16:
    """A float32 in two halves: the bfloat16 nearest to it, and the rest of its bits. For bfloat16 weights only."""

    seed = None
    residual_dtype = jnp.dtype(jnp.int16)

    def weights(self, p: jax.Array, residual: Any) -> jax.Array:
        """The float32."""
        wide = p.astype(jnp.float32)
        return straight_through(wide, _from_bits(_to_bits(wide) + residual.astype(jnp.int32)))

    def round(self, theta: jax.Array, dtype: jnp.dtype, bits: Bits) -> tuple[jax.Array, Any]:
        """Its halves."""
        del bits
        whole = _to_bits(jnp.where(jnp.isfinite(theta), _clip(theta, dtype), theta))
        upper = jnp.where(jnp.isfinite(theta), (whole + 0x8000) & ~0xFFFF, whole)
        return straight_through(theta, _from_bits(upper)), (whole - upper).astype(jnp.int16)


SHORT = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
"""The dtypes of weights that are rounded."""

NAMES: dict[str, Rounding] = {
    "nearest": Nearest(),
    "stochastic": Stochastic(),
    "residual8": Residual8(),
    "residual16": Residual16(),
}

RESIDUALS: dict[Any, Rounding] = {kind.residual_dtype: kind for kind in (Residual8(), Residual16())}
"""What reads a residual, by its dtype."""


def nearest(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The number of `dtype` nearest to each float32, ties to even: float32. For the rest see `stochastic`."""
    return _to_grid(x, dtype, lambda whole: 0x7FFF + ((whole >> 16) & 1), _half_even)


def stochastic(x: jax.Array, dtype: jnp.dtype, bits: jax.Array) -> jax.Array:
    """One of the two numbers of `dtype` around each float32, its mean the number itself: float32, exactly of `dtype`.

    Args:
        x: float32, any shape. Infinity and NaN give themselves, and what is larger than all of `dtype` its largest.
        dtype: bfloat16 or float16.
        bits: uint32 of that shape, random.
    """
    left = 23 - jnp.finfo(dtype).nmant  # the bits that a float32 has more: so many random ones make the mean exact
    return _to_grid(x, dtype, lambda _: (bits >> 16).astype(jnp.int32), lambda q: jnp.floor(q + uniform(bits, left)))


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivative of `x`: float32, of one shape."""
    del x
    return rounded


straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def as_stored(x: Any) -> jax.Array:
    """`x`, with no more digits than an array of its dtype has in memory.

    Inside of a program XLA leaves out the rounding of a result to 16 bits where wider arithmetic follows.
    """
    x = as_array(x)
    if x.dtype not in SHORT or not is_traced(x):
        return x
    return nearest(x.astype(jnp.float32), x.dtype).astype(x.dtype)


def spacing(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """How far apart the numbers of `dtype` are at each float32 `x`, away from 0: a power of two, at least 2^-118."""
    info = jnp.finfo(dtype)
    power = _from_bits(_to_bits(x) & 0x7F800000)  # 2^floor(log2 |x|)
    return jnp.maximum(power * float(info.eps), max(float(info.smallest_subnormal), 2.0**-118))


def _to_grid(
    x: jax.Array,
    dtype: jnp.dtype,
    carry: Callable[[jax.Array], jax.Array],
    whole: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`x` rounded to `dtype`, in float32. Infinity and NaN give themselves.

    Args:
        x: float32.
        dtype: bfloat16 or float16.
        carry: what to add to the bits of a float32, of which a bfloat16 is the upper half; the lower one is then cut.
        whole: how to round `x` in spacings of any other dtype: all is exact in float32.
    """
    if dtype == jnp.bfloat16:
        rounded = _from_bits((_to_bits(x) + carry(_to_bits(x))) & ~0xFFFF)
    else:
        s = spacing(x, dtype)
        rounded = whole(x / s) * s
    return straight_through(x, jnp.where(jnp.isfinite(x), _clip(rounded, dtype), x))


def _half_up(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _to_grid(x, dtype, lambda whole: 0x8000 + (whole >> 31), lambda q: jnp.floor(q + 0.5))


def _half_even(q: jax.Array) -> jax.Array:
    """As `jnp.round`, which not every kernel's compiler has. XLA knows that adding and subtracting 2^23 is nothing."""
    below = jnp.floor(q)
    odd = jnp.floor(below * 0.5) * 2 != below
    return below + ((q - below > 0.5) | ((q - below == 0.5) & odd))


def _clip(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
