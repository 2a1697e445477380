"""What training on a mesh keeps on each device, and sends between them, before anybody buys it.

Data parallelism moves each gradient over the axis of the data, however the rest is laid. With n devices on that axis,
and rings between them (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), each of them sends

    all-reduce      2 (n - 1) / n of the bytes      replicated: of the gradients
    reduce-scatter    (n - 1) / n                   ZeRO-1, FSDP: of the gradients
    all-gather        (n - 1) / n                   ZeRO-1: of the updates; FSDP: of the weights, forward and backward
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from adamite.sharding.layout import names_of, spread_by, with_axes
from adamite.sharding.spreading import zero1


class Layout(NamedTuple):
    """How weights and state are laid over a mesh."""

    tx: optax.GradientTransformation
    shardings: Any
    """Those of the weights."""


def decoder(parameters: int) -> list[tuple[int, ...]]:
    """The shapes of so many parameters: an embedding, layers of four matrices and two vectors, and what is left."""
    d = 128 * max(1, round((parameters / 12 / 128**2) ** (1 / 3)))
    layer = [(d,), (d, 3 * d), (d, d), (d,), (d, 4 * d), (4 * d, d)]
    size = sum(map(math.prod, layer))
    layers = parameters * 7 // 8 // size
    left = parameters - layers * size
    rows = left // d
    rows -= rows % 1024 if rows >= 32 * 1024 else 0  # a number that meshes divide
    return [shape for shape in [(rows, d), *layer * layers, (left - rows * d,)] if math.prod(shape)]


def layouts(tx: optax.GradientTransformation, params: Any, mesh: Mesh | AbstractMesh) -> dict[str, Layout]:
    """Three ways to train by `tx` on a mesh, one of whose axes is "data"; all others cut the matrices."""
    cut = tuple(axis for axis in mesh.axis_names if axis != "data")

    def over(names: tuple[str, ...], sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
        return with_axes(sharding, shape, names) if names and len(shape) > 1 else sharding

    everywhere = NamedSharding(mesh, PartitionSpec())
    weights = jax.tree.map(lambda p: over(cut, everywhere, p.shape), params)
    sharded = jax.tree.map(lambda p, s: with_axes(s, p.shape, ("data",)), params, weights)
    return {
        "replicated": Layout(tx, weights),
        "ZeRO-1": Layout(zero1(tx, mesh, param_shardings=weights), weights),
        "FSDP": Layout(tx, sharded),
    }


def sent(layout: Layout, params: Any, axis: str = "data") -> int:
    """Bytes that each device sends over an axis of the mesh in one step; gradients have the weights' dtypes."""
    tx, leaves = layout.tx, jax.tree.leaves(params)
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    own = jax.tree.leaves(layout.shardings)
    total = Fraction(0)
    for p, u, sharding, where in zip(leaves, jax.tree.leaves(updates), own, spread_by(tx, leaves, own), strict=True):
        n = sharding.mesh.shape[axis]
        cut = axis in names_of(sharding)
        weight, update = (
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize * (n if cut else 1) for x in (p, u)
        )
        moved = 3 * weight if cut else weight + update if axis in names_of(where) else 2 * weight
        total += Fraction(n - 1, n) * moved
    return int(total)
