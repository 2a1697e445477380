"""A kernel on each device's own part of a leaf: shard_map over the weights' sharding.

A block must not reach from one device to the next, and an element's number, which random bits are made of, is that in
the whole leaf: so results are those of one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamite.engines.leaf_step import Fused, Leaf, Place, kind, split
from adamite.numerics import is_traced
from adamite.random_bits import row_major

Run = Callable[[Fused, Any, Sequence[Leaf]], list[tuple[jax.Array, Any]]]


def sharding_of(x: Any) -> Any:
    """The NamedSharding of an array, where its type or the array itself shows one of several devices; else None."""
    own = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(own, NamedSharding) or AxisType.Manual in own.mesh.axis_types:
        return None
    if is_traced(x) and AxisType.Auto in own.mesh.axis_types:  # jit does not say how it is cut
        return None
    return own if math.prod(own.mesh.shape.values()) > 1 else None


def why_not(fused: Fused, leaf: Leaf) -> str:
    """Why the parts of a leaf cannot be stepped where they are; "" if they can."""
    own = sharding_of(leaf.p)
    spec = _spec(own, leaf.p.ndim)
    for x in jax.tree.leaves((leaf.g, leaf.stored)):
        its = sharding_of(x)
        if its is None or its.mesh != own.mesh:
            return "its state or gradient is not on the mesh that it is on"
        expected = spec if kind(x, leaf.p, fused.block) != "all" else ((),) * x.ndim
        if _spec(its, x.ndim) != expected:
            return "its state or gradient is not sharded as it is"
    if fused.block > 1 and leaf.p.ndim and spec[-1]:
        parts = math.prod(own.mesh.shape[name] for name in spec[-1])
        if leaf.p.shape[-1] % (parts * fused.block):
            return f"its last axis is cut into {parts} parts, in which blocks of {fused.block} are not whole"
    return ""


def run(kernel: Run, fused: Fused, scalars: Any, leaf: Leaf) -> tuple[jax.Array, Any]:
    """The leaf after a step by `kernel`, each device its own part."""
    own = sharding_of(leaf.p)
    spec, shape = _spec(own, leaf.p.ndim), leaf.p.shape
    arrays, form = jax.tree.flatten((leaf.g, leaf.p, leaf.stored))
    specs = [PartitionSpec(*sharding_of(x).spec) for x in arrays]
    numbers, put = split(scalars)

    def local(values: Sequence[jax.Array], *parts: jax.Array) -> list[jax.Array]:
        g, p, stored = form.unflatten(parts)
        origin = jnp.uint32(0)
        for axis, stride in enumerate(row_major(shape)):
            if spec[axis]:
                number = jax.lax.axis_index(spec[axis]).astype(jnp.uint32)
                origin += number * jnp.uint32(p.shape[axis] * stride % 2**32)
        part = Leaf(leaf.number, g, p, stored, leaf.dtype, Place(shape, origin))
        return jax.tree.leaves(kernel(fused, put(values), [part]))

    # Pallas's interpreter does not type what differs between devices.
    mapped = jax.shard_map(
        local, mesh=own.mesh, in_specs=(PartitionSpec(), *specs), out_specs=specs[1:], check_vma=False
    )
    _, *after = form.unflatten([arrays[0], *mapped(numbers, *arrays)])
    return after[0], after[1]


def _spec(sharding: Any, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The mesh's axes that cut each axis of an array."""
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec]
    return (*entries, *[()] * (ndim - len(entries)))
