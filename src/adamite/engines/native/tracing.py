"""The program of a step on a leaf: traced on one block, once for all leaves of a kind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamite.engines.leaf_step import Leaf, LeafStep
from adamite.engines.leaf_step import kind as kind_of
from adamite.engines.native.program import BLOCK, Program
from adamite.engines.native.writing import write


def program(step: LeafStep, scalars: Any, leaf: Leaf, *, over_gradient: bool = True) -> Program:
    """The program of a step on a leaf. Leaves of one kind share one tracing.

    Args:
        step: what is done.
        scalars: what it takes: a tree of arrays of shape (), numbers and None.
        leaf: its arrays; only their shapes and dtypes are used.
        over_gradient: whether an update lies where the gradient did, if it fits.

    Raises:
        UnsupportedError: the step does something that no kernel could do.
    """
    numbers, structure = jax.tree.flatten(scalars)
    kept = tuple((jnp.result_type(x), _is_weak(x)) if isinstance(x, jax.Array) else x for x in numbers)
    tile = _tile(step, leaf, over_gradient)
    mesh = jax.sharding.get_abstract_mesh()  # what is traced under one cannot be computed under another
    key = "program", structure, tuple((type(x), x) for x in kept), tile, mesh
    if key not in step.programs:
        step.programs[key] = _trace(step, structure, kept, tile)
    return step.programs[key]


class Tile(NamedTuple):
    """Shapes of one block of a leaf, hashable."""

    block: int
    arrays: tuple[tuple[str, str], ...]  # (kind, dtype) of what is read
    results: tuple[tuple[int, str, str], ...]  # (place among these that it is written over, or -1, kind, dtype)
    structure: Any  # of (g, p, stored)
    rounded: Any  # the dtype that updates are rounded to


def _is_weak(x: Any) -> bool:
    return jax.typeof(x).weak_type


KINDS = {"each": "element", "block": "block", "all": "leaf", "": "leaf"}


def _tile(step: LeafStep, leaf: Leaf, over_gradient: bool) -> Tile:
    arrays = tuple((KINDS[kind_of(x, leaf.g, step.block)], jnp.dtype(x.dtype).name) for x in leaf.arrays)
    if step.ends_with_weights:
        first = (1, *arrays[1])
    else:
        over = over_gradient and leaf.g.dtype == leaf.dtype
        first = (0 if over else -1, "element", jnp.dtype(leaf.dtype).name)
    begin = len(arrays) - len(leaf.kept)
    results = first, *((place, *arrays[place]) for place in range(begin, len(arrays)))
    structure = jax.tree.structure((leaf.g, leaf.p, leaf.stored))
    return Tile(step.block if step.block > 1 else BLOCK, arrays, results, structure, leaf.dtype)


def _trace(step: LeafStep, structure: Any, kept: tuple[Any, ...], tile: Tile) -> Program:
    is_array = [isinstance(x, tuple) for x in kept]

    def on_a_block(arrays: list[Any], number: Any, base: Any, *leaf: Any) -> list[Any]:
        each = iter(arrays)
        scalars = structure.unflatten([next(each) if there else x for there, x in zip(is_array, kept, strict=True)])

        def index() -> jax.Array:
            return base + jax.lax.iota(jnp.uint32, tile.block)

        g, p, stored = tile.structure.unflatten(leaf)
        return jax.tree.leaves(step(scalars, number, index, g, p, stored, tile.rounded))

    numbers = [jax.ShapeDtypeStruct((), x[0], weak_type=x[1]) for x in kept if isinstance(x, tuple)]
    counter = jax.ShapeDtypeStruct((), jnp.uint32)
    leaf = [jax.ShapeDtypeStruct((tile.block if k == "element" else 1,), dtype) for k, dtype in tile.arrays]
    closed = jax.make_jaxpr(on_a_block)(numbers, counter, counter, *leaf)
    return write(tile, closed, len(numbers))
