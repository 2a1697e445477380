"""One byte for each element, and one float32 for each block of them: its element of largest magnitude.

                        a mean of g                                     a mean of g^2, >= 0
    scale  =            the block's largest magnitude                   the block's largest element
    codes  =            encode(x / scale), to the nearest               encode(sqrt(x / scale)), stochastically
    x      ~            decode(codes) scale                             decode(codes)^2 scale

Blocks extend over the last axis, so that codes keep the parameter's shape and scales its leading axes: what shards the
parameter shards both. The largest element of a block is exact.

Why the root: gradients in one block differ by decades, their squares by twice as many, and codes are finest near 1. Why
stochastically: with b2 = 0.999 a mean changes by a thousandth in a step, and codes lie 1% to 50% apart; to the nearest,
what does not jump does not move. With b1 = 0.9 it moves, and the nearest has the smaller error (docs/memory.md).

Dettmers, Lewis, Shleifer & Zettlemoyer 2022, arXiv:2110.02861, section 2, with these deviations:

1. Segments grow by eight and meet (`adamite.storage.codes`), so that -1 is a code. In the paper it is none: the largest
   element, if negative, loses 0.7% at each step.
2. Roots, for moments that are >= 0, and stochastic rounding.
3. Blocks extend over the last axis only; the paper's ignore the shape.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr

from adamite import checks
from adamite.numerics import cast
from adamite.random_bits import Bits
from adamite.storage.codes import HALF, UE5M3, Code, CubicSigned, CubicUnsigned, random_r
from adamite.storage.dense import Dense

SIGNED, ROOTED, FLOAT8 = CubicSigned(), CubicUnsigned(), UE5M3()

APART = 157 << 24
"""157/256 of 2^32, near the golden section: neighbours are far apart, and 256 elements come round."""


class Quantized(NamedTuple):
    """A moment in blocks: of a leaf, or of a whole tree of them.

    The following hold for every leaf of shape (..., n):

    - the codes have its shape, the scales (..., ceil(n / block)) for a block that is a power of two;
    - where the scale is 1 and the codes are 0, the moment is 0;
    - a leaf that is not quantized stands in `codes` as it is, floating, and its one scale is 1, of shape (1, ..., 1).
    """

    codes: Any  # the parameter's shape; int8, or uint8 for the root of a moment >= 0
    scales: Any  # float32, one a block


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Codes for the leaves that are worth it; small ones stay as `Dense` keeps them.

    Attributes:
        block: how many elements along the last axis share a scale: a power of two.
        smallest: the least number of elements that a leaf must have, on all devices together, to be quantized; single
            numbers never are.
        float8: the codes of a moment >= 0 are `UE5M3`, not `CubicUnsigned` of the root: better where gradients in a
            block differ by more than a decade, worse otherwise.
        seed: of the random bits; None: round moments >= 0 to the nearest, too.
        unsigned: the moment is >= 0.
        initial: what it is before the first gradient.
    """

    block: int = 256
    smallest: int = 4096
    float8: bool = False
    seed: int | None = 0
    unsigned: bool = False
    initial: jax.typing.ArrayLike = 0.0
    form = Quantized

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", checks.power_of_two("block", self.block))
        object.__setattr__(self, "smallest", checks.whole("smallest", self.smallest, lowest=0))
        checks.flag("float8", self.float8)
        object.__setattr__(self, "seed", checks.seed(self.seed))

    def fresh(self, leaf: Any, path: KeyPath = ()) -> Quantized:
        """Blocks of the initial value."""
        if leaf.size < self.smallest or not leaf.shape:  # a number has no last axis
            return as_it_is(Dense(unsigned=self.unsigned, initial=self.initial).fresh(leaf, path))
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"the moments of a complex parameter cannot be kept in int8: params{keystr(path)}")
        initial = jnp.asarray(self.initial, jnp.float32)
        code = SIGNED if not self.unsigned else FLOAT8 if self.float8 else ROOTED
        one = jnp.where(initial == 0, 0, code.one)
        scales = jnp.full(_shape_of_scales(leaf.shape, self.block), jnp.where(initial == 0, 1.0, initial))
        return Quantized(jnp.full_like(leaf, one, dtype=code.dtype), scales)

    def like(self, moment: Dense) -> "Blockwise":
        """This storage for a moment like that one."""
        seed = self.seed if moment.unsigned else None
        return dataclasses.replace(self, seed=seed, unsigned=moment.unsigned, initial=moment.initial)

    def fits(self, shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
        """Whether the two are the same."""
        return shape == leaf_shape

    def decode(self, stored: Quantized) -> jax.Array:
        """The values, float32."""
        codes, scales = stored
        if jnp.issubdtype(codes.dtype, jnp.inexact):
            return Dense(unsigned=self.unsigned).decode(codes)
        code = self._code(codes.dtype)
        z = code.decode(codes)
        return (z * z if code is ROOTED else z) * _spread(scales, codes.shape[-1])

    def encode(self, x: jax.Array, stored: Quantized, bits: Bits) -> Quantized:
        """The values in blocks. A NaN or an infinity makes its whole block NaN when decoded, and no other."""
        if jnp.issubdtype(stored.codes.dtype, jnp.inexact):
            return Quantized(Dense(seed=self.seed).encode(x, stored.codes, bits), stored.scales)
        x = cast(x, jnp.float32)
        scales = _largest(x, stored.scales.shape[-1])
        empty = scales < jnp.finfo(jnp.float32).smallest_normal
        z = x * _spread(jnp.where(empty, 0.0, 1 / scales), x.shape[-1])
        scales = jnp.where(empty, 1.0, scales)
        r = random_r(_within_blocks(bits(), scales)) if self.seed is not None and self.unsigned else HALF
        code = self._code(stored.codes.dtype)
        return Quantized(ROOTED.encode_root(z, r) if code is ROOTED else code.encode(z, r), scales)

    def _code(self, dtype: jnp.dtype) -> Code:
        """The code whose dtype that is: a state says what it is."""
        if not self.unsigned:
            return SIGNED
        return ROOTED if dtype == ROOTED.dtype else FLOAT8


def as_it_is(values: jax.Array) -> Quantized:
    """The form of a leaf that is not quantized."""
    return Quantized(values, jnp.ones((1,) * values.ndim, jnp.float32))


def _shape_of_scales(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    return *shape[:-1], math.ceil(shape[-1] / block)


def _block(n: int, blocks: int) -> int:
    """How many of `n` elements are in each of so many blocks but the last."""
    return n if blocks == 1 else next(2**k for k in range(n.bit_length()) if math.ceil(n / 2**k) == blocks)


def _spread(scales: jax.Array, n: int) -> jax.Array:
    """Each block's number for each of its elements: (..., blocks) -> (..., n), or what broadcasts to it."""
    blocks = scales.shape[-1]
    if blocks == 1:
        return scales
    block = _block(n, blocks)
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, block))
    return wide.reshape(*scales.shape[:-1], blocks * block)[..., :n]


def _within_blocks(bits: jax.Array, scales: jax.Array) -> jax.Array:
    """Random bits for each element, of which only the first of each block are drawn.

    The others are as far behind as the elements are, times `APART`: every 256 elements have numbers evenly spread. Each
    is as random as the first; what a block is rounded by in all hardly differs from its mean.
    """
    n, blocks = bits.shape[-1], scales.shape[-1]
    first = bits[..., :1] if blocks == 1 else bits[..., :: _block(n, blocks)]
    return _spread(first, n) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) * jnp.uint32(APART)


def _largest(x: jax.Array, blocks: int) -> jax.Array:
    """The largest magnitude in each block, NaN for an infinite one: (..., n) -> (..., blocks)."""
    x = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))  # XLA's largest on CPUs may miss a NaN
    n = x.shape[-1]
    if blocks > 1:
        block = _block(n, blocks)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - n)]) if n % block else x
        x = x.reshape(*x.shape[:-1], blocks, block)
    largest = x.max(-1, keepdims=blocks == 1)
    return jnp.where(jnp.isinf(largest), jnp.nan, largest)
