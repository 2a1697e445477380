"""The program of a step on a leaf: its tracing on one block, once for all leaves of a kind (see `writing`)."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamite.engines.leaf_step import Fused, Leaf, arrays_in
from adamite.engines.leaf_step import kind as kind_of
from adamite.engines.writing import BLOCK, Program, write


def program(fused: Fused, scalars: Any, leaf: Leaf) -> Program:
    """The program of a step on a leaf. Leaves of one kind share one tracing.

    Args:
        fused: the step.
        scalars: what `step` takes: a tree of arrays of shape (), numbers and None.
        leaf: its arrays; only their shapes and dtypes are used.

    Raises:
        UnsupportedError: the step does something that no kernel could do.
    """
    numbers, structure = jax.tree.flatten(scalars)
    kept = tuple((jnp.result_type(x), _is_weak(x)) if isinstance(x, jax.Array) else x for x in numbers)
    tile = _tile(leaf, fused.block)
    key = fused.block, structure, tuple((type(x), x) for x in kept), tile
    known = _known.setdefault(fused.step, {})
    if key not in known:
        known[key] = _trace(fused, structure, kept, tile)
    return known[key]


_known: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Program]] = weakref.WeakKeyDictionary()


class _Tile(NamedTuple):
    """Shapes of one block of a leaf, hashable."""

    block: int
    arrays: tuple[tuple[str, str], ...]  # (kind, dtype)
    structure: Any
    rounded: Any  # the dtype that updates are rounded to


def _is_weak(x: Any) -> bool:
    return jax.typeof(x).weak_type


KINDS = {"each": "element", "block": "block", "all": "leaf", "": "leaf"}


def _tile(leaf: Leaf, block: int) -> _Tile:
    arrays = tuple((KINDS[kind_of(x, leaf.p, block)], jnp.dtype(x.dtype).name) for x in arrays_in(leaf))
    return _Tile(block if block > 1 else BLOCK, arrays, jax.tree.structure(leaf.stored), leaf.dtype)


def _trace(fused: Fused, structure: Any, kept: tuple[Any, ...], tile: _Tile) -> Program:
    is_array = [isinstance(x, tuple) for x in kept]

    def step(arrays: list[Any], number: Any, base: Any, *leaf: Any) -> list[Any]:
        each = iter(arrays)
        scalars = structure.unflatten([next(each) if there else x for there, x in zip(is_array, kept, strict=True)])
        g, p, *stored = leaf

        def index() -> jax.Array:
            return base + jax.lax.iota(jnp.uint32, tile.block)

        p, stored = fused.step(scalars, number, index, g, p, tile.structure.unflatten(stored), tile.rounded)
        return [p, *jax.tree.leaves(stored)]

    numbers = [jax.ShapeDtypeStruct((), x[0], weak_type=x[1]) for x in kept if isinstance(x, tuple)]
    counter = jax.ShapeDtypeStruct((), jnp.uint32)
    leaf = [jax.ShapeDtypeStruct((tile.block if k == "element" else 1,), dtype) for k, dtype in tile.arrays]
    closed = jax.make_jaxpr(step)(numbers, counter, counter, *leaf)
    return write(tile, closed, len(numbers))
