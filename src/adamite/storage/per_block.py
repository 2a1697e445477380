"""One number >= 0 per block of elements: what an average over some axes leaves, those axes kept with length 1.

A weight of shape (1024, 4096) averaged over its first axis keeps (1, 4096): 16 kB instead of 16 MB. The shape says
which axes they were, so that nothing else need be stored; it broadcasts against the parameter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr

from adamite.numerics import cast, widen
from adamite.random_bits import Bits
from adamite.storage.dense import Dense


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """A real array of the parameter's rank, 1 long along the axes that its blocks extend over.

    Attributes:
        axes: the partition, ``axes(path, leaf)``: which axes of a leaf the blocks extend over, counted from either end.
    """

    axes: Callable[[KeyPath, Any], tuple[int, ...]]
    seed = None
    form = None
    block = 1

    def fresh(self, leaf: Any, path: KeyPath = ()) -> jax.Array:
        """Zeros, one a block."""
        axes, n = self.axes(path, leaf), len(leaf.shape)
        if not isinstance(axes, (tuple, list)) or not all(isinstance(a, int) and -n <= a < n for a in axes):
            where = f"the partition of params{keystr(path)}"
            raise ValueError(f"{where} must be a tuple of axes of its shape {leaf.shape}, got {axes!r:.80}")
        return jnp.sum(Dense(unsigned=True).fresh(leaf), tuple({a % n for a in axes}), keepdims=True)

    def fits(self, shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
        """Whether each axis is as long as the leaf's or 1."""
        return len(shape) == len(leaf_shape) and all(n in (1, m) for n, m in zip(shape, leaf_shape, strict=True))

    def decode(self, stored: jax.Array) -> jax.Array:
        """The values, at least float32, one a block."""
        return widen(stored)

    def encode(self, x: jax.Array, stored: jax.Array, bits: Bits) -> jax.Array:
        """`x`, one a block, rounded to the dtype of `stored`."""
        del bits
        return cast(x, stored.dtype)
