"""The last values of a number, and whether the next is far above them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Norms(NamedTuple):
    """The gradients' norms, or the losses, that `skip_spikes` compares with."""

    values: Any  # float32, shape (window,): the last ones, in a ring
    count: Any  # int32, shape (): how many were recorded, ever


class Seen(NamedTuple):
    """What `skip_spikes` compares with where it is told the loss."""

    norms: Any  # Norms
    losses: Any  # Norms, of losses


def nothing_seen(window: int) -> Norms:
    """A ring of so many."""
    return Norms(jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32))


def watched(values: Sequence[jax.Array], finite: jax.Array, rings: Sequence[Norms], factor: Any) -> list[Any]:
    """Whether the step is good, and what was seen so far of each kind: nothing of steps that are not finite."""
    good, new = finite, []
    for value, ring in zip(values, rings, strict=True):
        low, after = _compared(value, ring, factor)
        good &= low
        new.append(jax.tree.map(functools.partial(jnp.where, finite), after, ring))
    return [good, *new]


def _compared(value: jax.Array, ring: Norms, factor: Any) -> tuple[jax.Array, Norms]:
    """Whether a value is no spike; and the ring with as much of the value as is allowed."""
    window = ring.values.size
    here = jnp.arange(window) < ring.count
    n = jnp.maximum(jnp.minimum(ring.count, window), 1)
    mean = jnp.sum(jnp.where(here, ring.values, 0)) / n
    std = jnp.sqrt(jnp.sum(jnp.where(here, (ring.values - mean) ** 2, 0)) / n)
    allowed = mean + factor * jnp.maximum(std, jnp.abs(mean) / 100)
    allowed = jnp.where(ring.count >= window // 2, allowed, jnp.finfo(jnp.float32).max)
    recorded = ring.values.at[ring.count % window].set(jnp.minimum(value, allowed).astype(jnp.float32))
    return value <= allowed, Norms(recorded, optax.safe_increment(ring.count))
