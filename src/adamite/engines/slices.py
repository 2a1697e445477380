"""A leaf stepped in slices, one leaf after the other, so that what is computed on the way stays small.

A slice is some rows of a leaf, with all of its other axes. The axis of the rows is split in two, (a, b), and a slice
takes all of a and some of b: where a mesh shards that axis over a power of two of devices, each has its part of every
slice at home, and nothing is gathered. What is left over at the end of b is in a last slice, which begins early or is
smaller.

XLA would undo that. It moves conversions of whole arrays out of a loop, reads a slice again after it was overwritten
(from a copy of the whole array), and starts all leaves at once. So a slice is stepped inside a branch of a condition
that is always met, which nothing is moved out of, and the condition of a leaf depends on the leaf before it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamite.random_bits import element_index, row_major

SLICE, SLICES, TILE = 2**20, 32, 32
"""A slice has about so many elements, but a leaf has at most so many slices. TPUs lay bytes out in tiles of 32 rows."""


class Cut(NamedTuple):
    """How a leaf is cut."""

    axis: int
    parts: int
    """a: into how many equal parts the axis is split; a slice has its share of each."""
    width: int
    """How much of each part a slice has, at most."""
    grain: int
    """A slice begins at a multiple of it: 1, or along the last axis the block."""


def cut(shape: tuple[int, ...], block: int, devices: int) -> Cut:
    """How to cut a leaf of at least one axis, in whose last axis blocks stay whole. Results do not depend on it."""
    slices = min(max(math.prod(shape) // SLICE, 1), SLICES)
    axis, grain = max(range(len(shape) - 1), key=lambda i: shape[i], default=0), 1
    if len(shape) == 1 or shape[axis] < slices:
        axis, grain = len(shape) - 1, block
    if slices == 1:
        return Cut(axis, 1, shape[axis], grain)
    rows, ragged = divmod(shape[axis], grain)
    parts = 1 if ragged else math.gcd(rows, 2 ** (devices - 1).bit_length())
    width = max(rows // slices // parts, 1)
    width -= width % TILE if width > TILE else 0
    return Cut(axis, parts, width * grain, grain)


def sweep(
    cut: Cut,
    step: Callable[[Any, Any, Callable[[], jax.Array]], tuple[Any, Any]],
    turn: jax.Array,
    read: Any,
    written: Any,
    blank: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """The results of a step on all slices, put together.

    Args:
        cut: how the leaf is cut.
        step: ``step(read, written, index) -> (u, written)``, on slices; ``index()`` gives the elements' numbers in the
            leaf.
        turn: int32 of shape (), any number >= 0 that the compiler does not know: the `turn` of the leaf before this.
        read: tree of arrays of the leaf's rank, each as long along the axis as the leaf, or 1, or one for each block.
        written: such a tree. Where the program may, it is updated in place.
        blank: where ``u`` is written, of its shape and dtype. What it holds does not matter; it should depend on
            `turn`, so that it is not there before.

    Returns:
        The next leaf's `turn`, which is known when this leaf is done, and ``u`` and `written` of the whole leaf.
    """
    axis, parts, width, grain = cut
    shape, at = blank.shape, axis + 1
    length = shape[axis] // parts
    full, rest = divmod(length, width)
    overlap = rest > 0 and grain == 1  # the last slice begins early, to be as long as the others
    strides = row_major(shape)
    strides = (*strides[:axis], strides[axis] * length, *strides[axis:])

    def split(x: jax.Array) -> jax.Array:
        here = x.shape[axis]
        return x.reshape(*x.shape[:axis], *((1, 1) if here == 1 else (parts, here // parts)), *x.shape[at:])

    def share(x: jax.Array, start: Any, size: int) -> tuple[Any, int]:
        """Which of x's elements along the cut belong to so many of the leaf's."""
        if x.shape[at] == 1:
            return 0, 1
        return (start, size) if x.shape[at] == length else (start // grain, math.ceil(size / grain))

    def one(i: Any, carry: tuple[jax.Array, Any, Any], size: int = width) -> tuple[jax.Array, Any, Any]:
        turn, *whole = carry
        due = i * width
        start = jnp.minimum(due, length - width) if overlap else due

        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, *share(x, start, size), axis=at)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, share(x, start, size)[0], axis=at)

        def index() -> jax.Array:
            here = element_index((*shape[:axis], parts, size, *shape[at:]), strides)
            return here + jnp.asarray(start, jnp.uint32) * jnp.uint32(strides[at] % 2**32)

        def undone(x: jax.Array, new: jax.Array) -> jax.Array:
            """Where a slice begins before its due, what was stepped already stays."""
            if new.shape[at] != size:
                return new
            row = start + jax.lax.broadcasted_iota(jnp.int32, new.shape, at)
            return jnp.where(row < due, take(x), new)

        def met() -> Any:
            slices, stored = jax.tree.map(take, (views, whole[1]))
            new = step(slices, stored, index)
            late = jax.tree.map(undone, tuple(whole), new) if overlap else new
            return (5 * turn + 1) & 0x7FFFFFFF, *late

        def never() -> Any:
            return turn, *jax.tree.map(take, whole)

        turn, *new = jax.lax.cond(turn >= 0, met, never)
        return turn, *jax.tree.map(put, whole, new)

    views = jax.tree.map(split, read)
    carry = turn, split(blank), jax.tree.map(split, written)

    if full == 1 and not rest:
        carry = one(0, carry)
    else:
        carry = jax.lax.fori_loop(0, full + overlap, one, carry)
        carry = one(full, carry, rest) if rest and not overlap else carry
    turn, *whole = carry
    return turn, *jax.tree.map(lambda x, old: x.reshape(old.shape), whole, [blank, written])
