"""State is born where the parameters live: same mesh, same sharding, eager and under jit."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from adamite.numerics import is_traced


def beside(leaf: Any, stored: Any) -> Any:
    """`stored`, its arrays of the leaf's rank sharded as `leaf` is, along each axis that its sharding divides.

    Eager arrays made by `zeros_like` already are, and the sharding on a mesh with Explicit axes is part of the type. On
    Auto axes under jit nothing ties zeros to a parameter: XLA puts zeros on one device or replicates them. There a
    selection ties both: ``where(False, leaf, zeros)`` shares one sharding with its operands, and XLA removes it after
    the sharding is settled, without reading the leaf. tests/test_placement.py holds that for every kind of mesh.
    """
    return jax.tree.map(lambda x: _tied(leaf, x), stored)


def _tied(leaf: Any, x: jax.Array) -> jax.Array:
    if not is_traced(leaf):
        return x if x.shape == leaf.shape else _placed(leaf, x)
    if x.ndim != leaf.ndim or not leaf.size:
        return x
    like = leaf.real
    if x.shape != leaf.shape:
        explicit = _explicit(leaf)
        if explicit is not None:
            x, like = jax.device_put(x, fitted(explicit, leaf.shape, x.shape)), like.max()
        else:
            like = _of_shape(like, x.shape)
    return jnp.where(False, like.astype(x.dtype), x)


def _placed(leaf: Any, x: jax.Array) -> jax.Array:
    """An array of another shape, made eagerly, on the devices of `leaf`."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return jax.device_put(x, fitted(sharding, leaf.shape, x.shape))
    alone = sharding is not None and sharding.num_devices == 1 and getattr(leaf, "committed", False)
    return jax.device_put(x, sharding) if alone else x


def _of_shape(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Any array of `shape` that is sharded as `leaf` is, along each axis that is divided into equal blocks."""
    for axis, (blocks, length) in enumerate(zip(shape, leaf.shape, strict=True)):
        if blocks == length:
            continue
        if length % blocks == 0:
            split = (*leaf.shape[:axis], blocks, length // blocks, *leaf.shape[axis + 1 :])
            leaf = leaf.reshape(split).max(axis + 1)
        else:  # the last block is shorter: no mesh divides such an axis into whole blocks
            leaf = jax.lax.slice_in_dim(leaf, 0, blocks, axis=axis)
    return leaf


def _explicit(leaf: Any) -> Any:
    """The leaf's sharding, if it is part of its type."""
    sharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


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
        concrete = isinstance(x, jax.Array) and not is_traced(x)
        return jax.device_put(x, home) if concrete and not x.committed else x

    return jax.tree.map(place, state)


def _home(params: Any) -> Sharding | None:
    """Where an array that all of `params` need belongs; None if they are not tied to any device."""
    for p in jax.tree.leaves(params):
        if isinstance(p, jax.Array) and not is_traced(p) and p.committed:
            if isinstance(p.sharding, NamedSharding):
                return NamedSharding(p.sharding.mesh, PartitionSpec())
            return p.sharding if p.sharding.num_devices == 1 else None
    return None
