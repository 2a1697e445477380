"""State is born where the parameters live: same mesh, same sharding, eager and under jit."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def beside(leaf: Any, stored: Any) -> Any:
    """`stored`, its arrays of the leaf's rank sharded as `leaf` is, along each axis that its sharding divides.

    Eager arrays made by `zeros_like` already are, and what a mesh with explicit axes shards is known. Else nothing ties
    zeros to a parameter under jit: XLA puts them on one device or copies them to all, so the tie is written down.
    """
    return jax.tree.map(lambda x: _tied(leaf, x), stored)


def _tied(leaf: Any, x: jax.Array) -> jax.Array:
    traced = isinstance(leaf, Tracer)
    if x.shape == leaf.shape:
        return shard_alike(leaf, x)[1] if traced else x
    known = _explicit(leaf) if traced else getattr(leaf, "sharding", None)
    if isinstance(known, NamedSharding):
        return jax.device_put(x, fitted(known, leaf.shape, x.shape))
    if not traced and getattr(leaf, "committed", False) and known is not None and known.num_devices == 1:
        return jax.device_put(x, known)
    if not traced or x.ndim != leaf.ndim or not leaf.size:
        return x
    # Only arrays of one shape can be tied. For another add what is 0, and made of the leaf.
    never = jnp.isnan(leaf) & ~jnp.isnan(leaf)
    for axis, (n, m) in enumerate(zip(x.shape, leaf.shape, strict=True)):
        if m % n == 0:
            never = never.reshape(*never.shape[:axis], n, m // n, *never.shape[axis + 1 :]).any(axis + 1)
        else:  # blocks that do not divide the axis: then no mesh does, either
            never = jax.lax.slice_in_dim(never, 0, n, axis=axis)
    return x + never.astype(x.dtype)


def _explicit(leaf: Any) -> Any:
    """The leaf's sharding, if it is part of its type."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else None
    return sharding if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types else None


def fitted(sharding: NamedSharding, shape: tuple[int, ...], other: tuple[int, ...]) -> NamedSharding:
    """That of an array of `shape`, for one of blocks of it, without the axes that would cut a block."""
    spec = []
    for names, n, m in itertools.zip_longest(sharding.spec, other, shape[: len(other)]):
        axes = names if isinstance(names, tuple) else () if names is None else (names,)
        shards = math.prod(sharding.mesh.shape[name] for name in axes)
        spec.append(names if n % shards == 0 and m % n == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def settle(state: Any, params: Any) -> Any:
    """`state`, what of it is tied to no device (step counts above all) copied to every device that holds `params`.

    An uncommitted array would move there by itself in the first jitted step: that step's result then has another
    sharding than its input, which costs a second compilation, and a checkpoint between the two cannot be sharded.
    Under jit such arrays follow the moments, and there is nothing to do.
    """
    home = _home(params)
    if home is None:
        return state

    def place(x: Any) -> Any:
        concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
        return jax.device_put(x, home) if concrete and not x.committed else x

    return jax.tree.map(place, state)


def _home(params: Any) -> Sharding | None:
    """Where an array that all of `params` need belongs; None if they are not tied to any device."""
    for p in jax.tree.leaves(params):
        if isinstance(p, jax.Array) and not isinstance(p, Tracer) and p.committed:
            if isinstance(p.sharding, NamedSharding):
                return NamedSharding(p.sharding.mesh, PartitionSpec())
            return p.sharding if p.sharding.num_devices == 1 else None
    return None
