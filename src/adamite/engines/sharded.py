"""A kernel on each device's own part of a leaf: shard_map over a sharding that the leaf's type shows, or that is told.

A block must not reach from one device to the next, and an element's number, which random bits are made of, is that in
the whole leaf: so results are those of one device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamite.engines.leaf_step import Leaf, LeafStep, Place, block_of, kind, split
from adamite.numerics import is_traced
from adamite.random_bits import row_major

Engine = Callable[[Any, Sequence[Leaf]], list[tuple[jax.Array, Any]]]
"""``engine(scalars, leaves) -> results``, of leaves on one device."""

_told: contextvars.ContextVar[Mapping[str, NamedSharding] | None] = contextvars.ContextVar("adamite_told", default=None)


@contextlib.contextmanager
def told(shardings: Mapping[str, NamedSharding]) -> Iterator[None]:
    """Steps inside are told how leaves are sharded that jit does not show: by `keystr` of their paths."""
    token = _told.set(shardings)
    try:
        yield
    finally:
        _told.reset(token)


def told_shardings() -> Mapping[str, NamedSharding] | None:
    """What steps are told here."""
    return _told.get()


def sharding_of(leaf: Leaf) -> NamedSharding | None:
    """The sharding of a leaf, where it is known that it is on several devices; else None."""
    shown = _shown(leaf.g)
    return shown if shown is not None or not is_traced(leaf.g) or _is_manual(leaf.g) else _on_several(leaf.sharding)


def why_not(step: LeafStep, leaf: Leaf) -> str:
    """Why the parts of a leaf cannot be stepped where they are; "" if they can."""
    own = _shown(leaf.g)
    if cut := cut_blocks(step, leaf, own or leaf.sharding):
        return cut
    if own is not None:
        spec = _spec(own, leaf.g.ndim)
        for x in leaf.arrays[1:]:
            other = _shown(x)
            if other is None or other.mesh != own.mesh:
                return "its state or gradient is not on the mesh that it is on"
            expected = spec if kind(x, leaf.g, step.block) != "all" else ((),) * x.ndim
            if _spec(other, x.ndim) != expected:
                return "its state or gradient is not sharded as it is"
    return ""


def cut_blocks(step: LeafStep, leaf: Leaf, sharding: Any) -> str:
    """That a leaf that is sharded so has blocks on several devices; "" if it has none."""
    spec = _spec(sharding, leaf.g.ndim)
    parts = math.prod(sharding.mesh.shape[name] for name in spec[-1]) if spec else 1
    block = block_of(step, leaf)
    if block > 1 and parts > 1 and leaf.g.shape[-1] % (parts * block):
        return f"its last axis is cut into {parts} parts, in which blocks of {block} are not whole"
    return ""


def run(engine: Engine, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]) -> list[tuple[jax.Array, Any]]:
    """The leaves after a step by `engine`, each device its own parts. Those of one mesh are stepped together."""
    meshes = [sharding_of(leaf).mesh for leaf in leaves]  # pyright: ignore[reportOptionalMemberAccess]  # all have one
    done: dict[int, tuple[jax.Array, Any]] = {}
    for mesh in dict.fromkeys(meshes):
        own = [i for i, other in enumerate(meshes) if other == mesh]
        done |= zip(own, _on_mesh(mesh, engine, step, scalars, [leaves[i] for i in own]), strict=True)
    return [done[i] for i in range(len(leaves))]


def _on_mesh(
    mesh: Any, engine: Engine, step: LeafStep, scalars: Any, leaves: Sequence[Leaf]
) -> list[tuple[jax.Array, Any]]:
    shardings: list[Any] = [sharding_of(leaf) for leaf in leaves]
    in_specs: list[PartitionSpec] = []
    out_specs: list[PartitionSpec] = []
    for leaf, own in zip(leaves, shardings, strict=True):
        specs = [
            PartitionSpec() if kind(x, leaf.g, step.block) == "all" else PartitionSpec(*own.spec) for x in leaf.arrays
        ]
        in_specs += specs
        out_specs += [specs[0], *specs[len(specs) - len(leaf.kept) :]]
    numbers, put = split(scalars)
    arrays, form = jax.tree.flatten([(leaf.g, leaf.p, leaf.stored) for leaf in leaves])

    def local(values: Sequence[jax.Array], *parts: jax.Array) -> list[jax.Array]:
        own_leaves = []
        for leaf, own, (g, p, stored) in zip(leaves, shardings, form.unflatten(parts), strict=True):
            place = Place(leaf.g.shape, _origin(own, leaf.g.shape, g.shape))
            own_leaves.append(leaf._replace(g=g, p=p, stored=stored, place=place, sharding=None))
        return jax.tree.leaves(engine(put(values), own_leaves))

    # Pallas's interpreter does not type what differs between devices.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), *in_specs), out_specs=out_specs, check_vma=False
    )
    new = iter(mapped(numbers, *arrays))
    return [(next(new), jax.tree.map(lambda _: next(new), leaf.stored)) for leaf in leaves]


def _origin(sharding: Any, shape: tuple[int, ...], part: tuple[int, ...]) -> jax.Array:
    """The number in the leaf of the first element that this device has, uint32."""
    spec, origin = _spec(sharding, len(shape)), jnp.uint32(0)
    for axis, stride in enumerate(row_major(shape)):
        if spec[axis]:
            number = jax.lax.axis_index(spec[axis]).astype(jnp.uint32)
            origin += number * jnp.uint32(part[axis] * stride % 2**32)
    return origin


def _shown(x: Any) -> NamedSharding | None:
    """The sharding of an array, where its type or the array itself shows one of several devices; else None."""
    own = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(own, NamedSharding) or AxisType.Manual in own.mesh.axis_types:
        return None
    if is_traced(x) and AxisType.Auto in own.mesh.axis_types:  # jit does not say how it is cut
        return None
    return _on_several(own)


def _on_several(sharding: NamedSharding | None) -> NamedSharding | None:
    return sharding if sharding is not None and math.prod(sharding.mesh.shape.values()) > 1 else None


def _is_manual(x: Any) -> bool:
    return AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types


def _spec(sharding: Any, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The mesh's axes that cut each axis of an array."""
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec]
    return (*entries, *[()] * (ndim - len(entries)))
