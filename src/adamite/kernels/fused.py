"""What one step does to a leaf, weights included: the function that kernels are made of."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from adamite.engine.leafwise import Part
from adamite.numerics import cast, widen
from adamite.random_bits import fold, random_bits


class Fused(NamedTuple):
    """One step of a leaf."""

    step: Callable[..., tuple[jax.Array, Any]]
    """``step(scalars, number, index, g, p, stored) -> (p, stored)``: `number` is the leaf's in the tree, ``index()``
    gives the number of each element in the leaf, uint32."""

    block: int
    """How many elements along the last axis are stepped together."""


@functools.cache
def fused(part: Part) -> Fused:
    """The step of `part`, then ``optax.apply_updates``."""
    rounded = part.weights is None

    def step(scalars: Any, number: Any, index: Any, g: Any, p: Any, stored: Any) -> tuple[jax.Array, Any]:
        wide = widen(p) if rounded else p
        u, new = part.step(scalars, widen(g), wide, stored, lambda key: random_bits(fold(key, number), index()))
        u = cast(u, g.dtype) if rounded else u
        return (p + u).astype(p.dtype), new

    return Fused(step, part.block)
