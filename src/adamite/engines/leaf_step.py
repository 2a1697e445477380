"""What an engine is given: the step of one leaf, as a function of its elements, and the leaf.

An engine may apply the function to a whole leaf, to slices, or to tiles in a kernel. So no rule, storage or rounding is
written again for an engine.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from adamite.engines.closures import given
from adamite.numerics import cast, is_traced
from adamite.random_bits import row_major


class LeafStep:
    """The step of a leaf, or of a tile of one, from the gradient to the update or to the weights.

    Attributes:
        update: ``update(scalars, number, index, g, p, stored) -> (u, stored)``: the leaf's number in its tree;
            ``index()``, the elements' numbers in the leaf, uint32; gradient, weights (None: there are none) and what
            the state holds. ``u`` is of at least float32. An element of the results depends on its block alone, unless
            the step is not `elementwise`.
        ends_with_weights: whether the result is the weights. Else it is the update.
        to_weights: as `update`, with the new weights in place of ``u``; None: they are the sum of weights and update.
        block: how many elements along the last axis are stepped together.
        in_slices: whether XLA steps large leaves in slices.
        few_bits: ``few_bits(stored)``: whether a moment of the leaf has fewer bits than a float32.
        elementwise: whether a step does not need the whole leaf.
        closes_over: the arrays that these functions refer to beside their arguments. With any, the step is another in
            the next step, and no compiled program of it is used again.
    """

    def __init__(
        self,
        update: Callable[..., tuple[jax.Array, Any]],
        *,
        ends_with_weights: bool,
        to_weights: Callable[..., tuple[jax.Array, Any]] | None = None,
        block: int = 1,
        in_slices: bool = False,
        few_bits: Callable[[Any], bool] = lambda _: False,
        elementwise: bool = True,
        closes_over: Sequence[jax.Array] = (),
    ) -> None:
        """See the attributes."""
        self.update = update
        self.ends_with_weights = ends_with_weights
        self.to_weights = to_weights
        self.block = block
        self.in_slices = in_slices
        self.few_bits = few_bits
        self.elementwise = elementwise
        self.closes_over = tuple(closes_over)
        self.programs: dict[Any, Any] = {}
        """What engines have made of the step, each under a key of its own."""

    def __call__(
        self, scalars: Any, number: Any, index: Callable[[], jax.Array], g: Any, p: Any, stored: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        """``(weights or update, stored)``; the update is rounded to `dtype`."""
        if self.ends_with_weights and self.to_weights:
            return self.to_weights(scalars, number, index, g, p, stored)
        u, new = self.update(scalars, number, index, g, p, stored)
        return self.result(p, cast(u, dtype)), new

    def open(self) -> tuple["LeafStep", list[jax.Array]]:
        """The same step, of scalars ``(scalars, arrays)``, and the traced arrays that it then does not close over.

        What is traced later than it is called may not refer to what is traced now.
        """
        arrays = [x for x in self.closes_over if is_traced(x)]

        def opened(function: Callable[..., Any]) -> Callable[..., Any]:
            def of_arguments(scalars: Any, *args: Any) -> Any:
                scalars, values = scalars
                return given(function, arrays, values)(scalars, *args)

            return of_arguments

        step = LeafStep(
            opened(self.update),
            ends_with_weights=self.ends_with_weights,
            to_weights=self.to_weights and opened(self.to_weights),
            block=self.block,
            in_slices=self.in_slices,
            few_bits=self.few_bits,
            elementwise=self.elementwise,
        )
        return step, arrays

    def result(self, p: Any, u: jax.Array) -> jax.Array:
        """What the step ends with, where the update is `u`."""
        return moved(p, u) if self.ends_with_weights else u


def moved(p: Any, u: jax.Array) -> Any:
    """A parameter after its update."""
    return None if p is None else jnp.asarray(p + u).astype(jnp.asarray(p).dtype)


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
    p: jax.Array | None
    stored: Any
    dtype: jnp.dtype
    """That the update is rounded to."""
    place: Place | None = None
    sharding: NamedSharding | None = None
    """That which `sharded.told` gives it, where jit does not show it."""
    path: str = ""
    """Its path in the tree, where anybody wants to know it."""

    @property
    def arrays(self) -> list[jax.Array]:
        """Gradient, weights if there are any, and what the state holds."""
        return jax.tree.leaves((self.g, self.p, self.stored))

    @property
    def kept(self) -> list[jax.Array]:
        """What the state holds."""
        return jax.tree.leaves(self.stored)


def kind(x: Any, g: Any, block: int) -> str:
    """What an array of the state is to its gradient: "each" element has one, each "block", "all" one together.

    "" if it is none of these.
    """
    if x.shape == g.shape:
        return "each"
    if g.ndim and x.shape == (*g.shape[:-1], math.ceil(g.shape[-1] / block)):
        return "block"
    return "all" if math.prod(x.shape) == 1 else ""


def block_of(step: LeafStep, leaf: Leaf) -> int:
    """How many elements along the last axis belong together: 1 where the state holds nothing for each block."""
    return step.block if any(kind(x, leaf.g, step.block) == "block" for x in leaf.kept) else 1


def unserved(step: LeafStep, leaf: Leaf, dtypes: Sequence[Any]) -> str:
    """Why no kernel can take this leaf; "" if one may."""
    if not leaf.g.size:
        return "it has no elements"
    for dtype in (*(x.dtype for x in leaf.arrays), leaf.dtype):
        if dtype not in dtypes:
            return f"no kernel is for {dtype.name}"
    of_weights = leaf.p is None or leaf.p.shape == leaf.g.shape
    if not of_weights or not all(kind(x, leaf.g, step.block) for x in leaf.kept):
        return "what its state holds is neither one number for each weight nor one for each block"
    return ""


def result_types(step: LeafStep, leaves: Sequence[Leaf]) -> list[Any]:
    """The types of what is made of leaves: those of the gradient or the weights, and of what the state holds."""
    types = []
    for leaf in leaves:
        first = jax.typeof(leaf.p) if step.ends_with_weights else jax.typeof(leaf.g).update(dtype=leaf.dtype)
        types += [x.update(weak_type=False) for x in (first, *map(jax.typeof, leaf.kept))]
    return types


def split(scalars: Any) -> tuple[list[jax.Array], Callable[[Sequence[Any]], Any]]:
    """The arrays in a tree, and how others take their places."""
    leaves, structure = jax.tree.flatten(scalars)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    fixed = [None if isinstance(x, jax.Array) else x for x in leaves]

    def put(values: Sequence[Any]) -> Any:
        new = list(fixed)
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
    *leading, rows, columns = leaf.g.shape
    if leaf.place is None:
        return (lead * jnp.uint32(rows) + row) * jnp.uint32(columns % 2**32)
    *strides, stride, _ = row_major(leaf.place.shape)
    first = row * jnp.uint32(stride % 2**32)
    for length, stride in zip(reversed(leading), reversed(strides), strict=True):
        lead, index = lead // jnp.uint32(length), lead % jnp.uint32(length)
        first += index * jnp.uint32(stride % 2**32)
    return first


@functools.lru_cache(maxsize=8)
def step_once(step: LeafStep, dtype: Any) -> Callable[..., Any]:
    """``(scalars, number, index, g, p, stored) -> (result, stored)`` by arrays alone: traced once for tiles alike."""

    def by_arrays(scalars: Any, number: Any, index: Any, g: Any, p: Any, stored: Any) -> tuple[jax.Array, Any]:
        return step(scalars, number, lambda: index, g, p, stored, dtype)

    return jax.jit(by_arrays)


def typed(shape: tuple[int, ...], dtype: Any, inputs: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """A result's type: inside of shard_map it differs over the axes over which the inputs do."""
    over = max((jax.typeof(x).manual_axis_type for x in inputs), key=lambda its: len(its.varying))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over)
