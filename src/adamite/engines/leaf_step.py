"""What a kernel runs: the whole step of one leaf, from the gradient to the weight, as a function of its elements.

A kernel takes a leaf in tiles and calls the same function on each, so no rule, storage or rounding is written again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamite.random_bits import row_major


class Fused(NamedTuple):
    """One step, weights included."""

    step: Callable[..., tuple[jax.Array, Any]]
    """``step(scalars, number, index, g, p, stored, dtype) -> (p, stored)`` for a leaf or a tile of it: the leaf's
    number in its tree; ``index()``, the elements' numbers in the leaf, uint32; gradient, weights and what the state
    holds; the dtype that updates are rounded to. An element of the results depends on its block alone."""

    block: int
    """How many elements along the last axis are stepped together."""


class Place(NamedTuple):
    """Where a part lies in the whole leaf."""

    shape: tuple[int, ...]
    """Of the whole."""
    origin: jax.Array
    """The number of the part's first element, uint32 of shape ()."""


class Leaf(NamedTuple):
    """One leaf, or one device's part of it, before its step."""

    number: int
    g: jax.Array
    p: jax.Array
    stored: Any
    dtype: jnp.dtype
    place: Place | None = None


def arrays_in(leaf: Leaf) -> list[Any]:
    """The arrays of a leaf, its gradient and weights first."""
    return [leaf.g, leaf.p, *jax.tree.leaves(leaf.stored)]


def kind(x: Any, p: Any, block: int) -> str:
    """What an array of the state is to its weights: "each" element has one, each "block", "all" one together.

    "" if it is none of these.
    """
    if x.shape == p.shape:
        return "each"
    if p.ndim and x.shape == (*p.shape[:-1], math.ceil(p.shape[-1] / block)):
        return "block"
    return "all" if math.prod(x.shape) == 1 else ""


def unserved(fused: Fused, leaf: Leaf, dtypes: Sequence[Any]) -> str:
    """Why no kernel can take this leaf; "" if one may."""
    if not leaf.p.size:
        return "it has no elements"
    for x in jax.tree.leaves((leaf.g, leaf.p, leaf.stored)):
        if x.dtype not in dtypes:
            return f"no kernel is for {x.dtype.name}"
    if leaf.g.shape != leaf.p.shape or not all(kind(x, leaf.p, fused.block) for x in jax.tree.leaves(leaf.stored)):
        return "what its state holds is neither one number for each weight nor one for each block"
    return ""


def split(scalars: Any) -> tuple[list[jax.Array], Callable[[Sequence[Any]], Any]]:
    """The arrays among the scalars, and how others take their places."""
    leaves, structure = jax.tree.flatten(scalars)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def put(values: Sequence[Any]) -> Any:
        new = list(leaves)
        for i, value in zip(places, values, strict=True):
            new[i] = value
        return structure.unflatten(new)

    return [leaves[i] for i in places], put


def first_of_row(leaf: Leaf, row: Any, lead: Any = 0) -> Any:
    """The number in the whole leaf of a row's first element, where rows and what leads them are counted in this part.

    Args:
        leaf: of at least two axes.
        row: along the last axis but one, uint32.
        lead: all axes before it taken together, uint32 of shape ().
    """
    *leading, rows, columns = leaf.p.shape
    if leaf.place is None:
        return (lead * jnp.uint32(rows) + row) * jnp.uint32(columns % 2**32)
    *strides, stride, _ = row_major(leaf.place.shape)
    first = row * jnp.uint32(stride % 2**32)
    for length, stride in zip(reversed(leading), reversed(strides), strict=True):
        lead, index = lead // jnp.uint32(length), lead % jnp.uint32(length)
        first += index * jnp.uint32(stride % 2**32)
    return first


@functools.lru_cache(maxsize=8)
def step_once(step: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """``(scalars, number, index, g, p, stored) -> (p, stored)`` by arrays alone: traced once for all tiles alike."""
    return jax.jit(lambda scalars, number, index, *rest: step(scalars, number, lambda: index, *rest, dtype))


def typed(shape: tuple[int, ...], dtype: Any, inputs: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """A result's type: inside of shard_map it differs over the axes over which the inputs do."""
    over = max((jax.typeof(x).manual_axis_type for x in inputs), key=lambda its: len(its.varying))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over)
