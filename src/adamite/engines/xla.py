"""Steps of leaves by XLA: whole, or a large leaf slice by slice (see `slices`). It takes every leaf on every device.

Leaves of one shape share one tracing, and on CPUs one compilation: that compiler compiles equal loops once, if no
constant in them is a leaf's own. In slices, a leaf begins when the leaf before it is done, so that what is computed on
the way is of one slice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamite.engines.leaf_step import Leaf, LeafStep
from adamite.engines.products import round_products
from adamite.engines.slices import cut, sweep
from adamite.numerics import cast, is_traced
from adamite.random_bits import element_index

SLICED = 2**12
"""Smaller leaves are stepped whole."""


def run(
    step: LeafStep, scalars: Any, leaves: Sequence[Leaf], devices: int, platform: str = ""
) -> list[tuple[jax.Array, Any]]:
    """The result of each leaf, weights or update, and what the state then holds for it.

    Args:
        step: what is done.
        scalars: what it takes once.
        leaves: the leaves.
        devices: over how many devices XLA may spread a leaf. Slices are made so that each has its part of each.
        platform: that for which the step is lowered, if it is known.
    """
    traced_once = step.in_slices or _worth_tracing_once(step, leaves)
    one = _traced_once(step, devices) if traced_once else _update(step, devices)
    turn, results = _first_turn(scalars) if step.in_slices else None, []
    zero = _unknown_zero(scalars) if platform == "cpu" else None  # on TPUs it would cost temporary memory
    for leaf in leaves:
        # An array of two constants is not moved into a loop, as one is.
        number = leaf.number if zero is None else (np.array([leaf.number, 0], np.uint32) + zero)[0]
        turn, u, stored = one(leaf.dtype, scalars, number, turn, leaf.g, leaf.p, leaf.stored)
        results.append((step.result(leaf.p, u), stored))
    return results


def _traced_once(step: LeafStep, devices: int) -> Callable[..., Any]:
    """`_update`, traced once for all leaves of a shape and dtype."""
    key = "xla", devices
    if key not in step.programs:
        step.programs[key] = jax.jit(_update(step, devices), static_argnums=0)
    return step.programs[key]


def _worth_tracing_once(step: LeafStep, leaves: Sequence[Leaf]) -> bool:
    """Whether a jitted step, which is traced once a shape, spares tracing: where a shape recurs; or compiling, eagerly.

    An eager step is compiled once a shape, too, if it is the same in the next step.
    """
    if not any(is_traced(x) for leaf in leaves for x in leaf.arrays):
        return not step.closes_over
    return len({leaf.g.shape for leaf in leaves}) < len(leaves)


def _update(step: LeafStep, devices: int) -> Callable[..., tuple[Any, jax.Array, Any]]:
    """``(dtype, scalars, number, turn, g, p, stored) -> (turn, u, stored)``: the update of a leaf."""

    def update(dtype: Any, scalars: Any, number: Any, turn: Any, g: Any, p: Any, stored: Any) -> tuple[Any, Any, Any]:
        def one(read: Any, written: Any, index: Callable[[], jax.Array]) -> tuple[jax.Array, Any]:
            u, new = _alike(step, scalars, number, index, *read, written)
            return cast(u, dtype), new

        if not step.in_slices or g.size < SLICED:
            return turn, *one((g, p), stored, lambda: element_index(g.shape))
        blank = jnp.full_like(g, turn, dtype)
        return sweep(cut(g.shape, step.block, devices), one, turn, (g, p), stored, blank)

    return _placed(update) if step.in_slices else update


def _alike(step: LeafStep, scalars: Any, number: Any, index: Callable[[], jax.Array], *leaf: Any) -> tuple[Any, Any]:
    """The update; with the same bits in every program of XLA's where the state has few bits."""
    if not step.few_bits(leaf[-1]):
        return step.update(scalars, number, index, *leaf)
    update = round_products(lambda scalars, number, index, *leaf: step.update(scalars, number, lambda: index, *leaf))
    return update(scalars, number, index(), *leaf)


def _placed(update: Callable[..., Any]) -> Callable[..., Any]:
    """`update` for explicit meshes, too, whose types know no blocks: results are sharded as what they replace."""

    def placed(dtype: Any, scalars: Any, number: Any, turn: Any, g: Any, p: Any, stored: Any) -> Any:
        mesh = jax.typeof(g).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return update(dtype, scalars, number, turn, g, p, stored)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (g, stored))
        own = functools.partial(update, dtype)
        auto: Any = jax.sharding.auto_axes(own, out_sharding=(NamedSharding(mesh, PartitionSpec()), *shardings))
        return auto(scalars, number, turn, g, p, stored)

    return placed


def _first_turn(scalars: Any) -> jax.Array:
    """A number >= 0 that the compiler does not know: part of any number that is computed at each step."""
    computed = [x for x in jax.tree.leaves(scalars) if isinstance(x, jax.Array)]
    return computed[0].astype(jnp.int32) & 0x7FFFFFFF if computed else jnp.int32(0)


def _unknown_zero(scalars: Any) -> jax.Array | None:
    """0, uint32 of shape (), of which the compiler does not know that it is; None where no step draws random bits."""
    keys = [x for x in jax.tree.leaves(scalars) if is_traced(x) and x.dtype == jnp.uint32]
    return (keys[0] & 0x7FFFFFFF) >> 31 if keys else None
