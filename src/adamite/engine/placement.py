"""State is born where the parameters live: same mesh, same sharding, eager and under jit."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def beside(leaf: Any, stored: Any) -> Any:
    """`stored`, its arrays of the leaf's shape sharded as `leaf` is; of its shape but for axes of length 1, likewise.

    Eager arrays made by `zeros_like` already are. Under jit nothing ties zeros to the parameter: XLA puts them on one
    device or copies them to all, so the tie is written down.
    """
    if not isinstance(leaf, Tracer):
        return stored

    def tie(x: jax.Array) -> jax.Array:
        if x.shape == leaf.shape:
            return shard_alike(leaf, x)[1]
        if (
            x.ndim != leaf.ndim
            or not leaf.size
            or any(n not in (1, m) for n, m in zip(x.shape, leaf.shape, strict=True))
        ):
            return x
        # Only arrays of one shape can be tied: tie the broadcast one, and take the axes of length 1 out again.
        whole = shard_alike(leaf, jnp.broadcast_to(x, leaf.shape))[1]
        return whole.max([axis for axis, n in enumerate(x.shape) if n == 1], keepdims=True)

    return jax.tree.map(tie, stored)


def settle(state: Any, params: Any) -> Any:
    """`state`, its scalars (step counts) copied to every device that holds `params`.

    An uncommitted scalar would move there by itself in the first jitted step: that step's result then has another
    sharding than its input, which costs a second compilation, and a checkpoint between the two cannot be sharded.
    Under jit scalars follow the moments, and there is nothing to do.
    """
    home = _home(params)
    if home is None:
        return state

    def place(x: Any) -> Any:
        concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
        return jax.device_put(x, home) if concrete and x.ndim == 0 and not x.committed else x

    return jax.tree.map(place, state)


def _home(params: Any) -> Sharding | None:
    """Where a scalar that all of `params` need belongs; None if they are not tied to any device."""
    for p in jax.tree.leaves(params):
        if isinstance(p, jax.Array) and not isinstance(p, Tracer) and p.committed:
            if isinstance(p.sharding, NamedSharding):
                return NamedSharding(p.sharding.mesh, PartitionSpec())
            return p.sharding if p.sharding.num_devices == 1 else None
    return None
