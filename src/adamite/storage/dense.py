"""One number per element, in a floating dtype.

Without a dtype it is the parameter's own, but at least float32: a moving average needs the bits. With decay 0.999 an
update changes a moment by about a thousandth, less than half a unit in the last place of a bfloat16 (1/256): rounded to
the nearest, it stops moving before it has arrived. Rounded stochastically it arrives on average.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from adamite import checks
from adamite.numerics import cast, wide_dtype, widen
from adamite.random_bits import Bits
from adamite.rounding import stochastic


@dataclasses.dataclass(frozen=True)
class Dense:
    """An array of the parameter's shape.

    Attributes:
        dtype: what the values are rounded to, or None for the parameter's dtype and at least float32. A complex
            parameter's moment is complex: the dtype is that of its parts, and 16 bits are refused.
        unsigned: the moment is real and >= 0, for a complex parameter too: an average of ``|g|^2``, a largest ``|g|``.
        initial: what it is before the first gradient.
        seed: of the random bits for stochastic rounding to 16 bits; None: round to the nearest.
    """

    dtype: jnp.dtype | None = None
    unsigned: bool = False
    initial: jax.typing.ArrayLike = 0.0
    seed: int | None = None
    form = None
    block = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", checks.floating_dtype("dtype", self.dtype))
        object.__setattr__(self, "seed", checks.seed(self.seed))

    def fresh(self, leaf: Any, path: KeyPath = ()) -> jax.Array:
        """An array of the leaf's shape, full of the initial value."""
        del path
        return jnp.full_like(leaf, self.initial, dtype=self._dtype_for(leaf.dtype))

    def like(self, moment: "Dense") -> "Dense":
        """This storage for a moment like that one."""
        return dataclasses.replace(self, unsigned=moment.unsigned, initial=moment.initial)

    def fits(self, shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
        """Whether the two are the same."""
        return shape == leaf_shape

    def decode(self, stored: jax.Array) -> jax.Array:
        """The values, at least float32."""
        both_parts = self.unsigned and jnp.iscomplexobj(stored)  # as optax keeps it, the imaginary part 0
        return widen(stored.real if both_parts else stored)

    def encode(self, x: jax.Array, stored: jax.Array, bits: Bits) -> jax.Array:
        """`x` rounded to the dtype of `stored`."""
        if self.seed is not None and stored.dtype.itemsize < 4:
            x = stochastic(cast(x, jnp.float32), stored.dtype, bits())
        return cast(x, stored.dtype)

    def _dtype_for(self, own: jnp.dtype) -> jnp.dtype:
        if not jnp.issubdtype(own, jnp.complexfloating):
            return self.dtype or wide_dtype(own)
        if self.unsigned:
            return jnp.finfo(own).dtype
        if self.dtype is None:
            return own
        if self.dtype.itemsize < 4:
            raise ValueError(f"the moments of a complex parameter cannot be kept in {self.dtype.name}: use float32")
        return jnp.dtype(f"complex{2 * jnp.finfo(self.dtype).bits}")
