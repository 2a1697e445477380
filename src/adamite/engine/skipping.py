"""A step that is taken or left out, as its numbers say: a branch, or a step that is undone.

A branch costs nothing where it is not taken, but what comes out of it is written to memory before it is used: the
updates, four bytes for each weight. A selection between the new numbers and the old is part of the pass that makes
them, if the compiler sees it so. XLA's for TPUs does; that for CPUs copies the state (13 bytes for a weight of Adam's).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite.numerics import as_array, is_none, is_traced, over_devices

Step = Callable[[], tuple[Any, optax.OptState]]


def all_finite(groups: Iterable[Sequence[jax.Array]], axes: tuple[str, ...]) -> jax.Array:
    """Whether no array holds a NaN or an infinity, on all devices: a bool of shape ().

    Args:
        groups: arrays of one shape are read together, and computed in that pass where they need not be kept.
        axes: those of shard_map or pmap over which arrays differ.
    """
    bad = jnp.int32(0)
    for arrays in groups:
        wrong = functools.reduce(jnp.logical_or, (~jnp.isfinite(x) for x in arrays))
        bad += over_devices(jnp.any(wrong).astype(jnp.int32), wrong, axes)
    return bad == 0


def step_if(wanted: jax.Array, take: Step, leave: Step, *, seldom_left_out: bool = False) -> tuple[Any, optax.OptState]:
    """What `take` gives if it is wanted, else what `leave` gives.

    Args:
        wanted: bool of shape (), the same on all devices that take the step together.
        take: ``take() -> (updates, state)``, or parameters in place of updates. Under jit it is a branch.
        leave: the like, with the state before.
        seldom_left_out: the step may be taken first and undone, where that is cheaper.
    """
    if not is_traced(wanted):
        return take() if wanted else leave()
    branch, undo = (functools.partial(way, wanted, take, leave) for way in (branched, undone))
    return jax.lax.platform_dependent(tpu=undo, default=branch) if seldom_left_out else branch()


def no_updates(gradients: optax.Updates, like: optax.Updates) -> optax.Updates:
    """Updates of the dtypes of `like` that move nothing, where the gradients are.

    They are -0, for 0 + -0 is 0 and -0 + -0 is -0: weights stay as they are, to the bit.
    """

    def nothing(g: Any, u: Any) -> Any:
        if u is None:
            return None
        zero = jnp.asarray(-0.0, u.dtype)
        return jnp.where(as_array(g) == 0, zero, zero)

    return jax.tree.map(nothing, gradients, like, is_leaf=is_none)


def branched(wanted: jax.Array, take: Step, leave: Step) -> tuple[optax.Updates, optax.OptState]:
    """One of the two is run."""
    return jax.lax.cond(wanted, take, leave)


def undone(wanted: jax.Array, take: Step, leave: Step) -> tuple[optax.Updates, optax.OptState]:
    """Both are."""
    return jax.tree.map(functools.partial(jnp.where, wanted), take(), leave())
