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

from adamite.core.matching import counterparts
from adamite.numerics import as_array, is_none, is_traced, over_devices, widen

Step = Callable[[], tuple[Any, optax.OptState]]


def all_finite(groups: Iterable[Sequence[jax.Array]], axes: tuple[str, ...]) -> jax.Array:
    """Whether no array holds a NaN or an infinity, on all devices: a bool of shape ().

    The flags of all groups are stacked before they are combined. A sum of them, ``a + b + ...``, would be computed
    again by XLA in every fusion that uses the result: a program of n^2 operations for n leaves.

    Args:
        groups: arrays of one shape are read together, and computed in that pass where they need not be kept.
        axes: those of shard_map or pmap over which arrays differ.
    """
    flags = []
    for arrays in groups:
        if arrays[0].size:
            wrong = _holds_nonfinite(arrays)
            flags.append(over_devices(wrong.astype(jnp.int32), wrong, axes) if axes else wrong)
    return jnp.all(jnp.stack(flags) == 0) if flags else jnp.bool_(True)


def _holds_nonfinite(arrays: Sequence[jax.Array]) -> jax.Array:
    """Whether any of some arrays of one shape does: not 0, of shape ().

    XLA's CPU compiler has a library for sums and for the maximum of bytes. For an "or" it compiles three loops. It can
    compute a product within a sum, so that of a single array nothing is written to memory: the sum of 2^-40 of each
    element does not overflow, and is finite if all elements are.
    """
    if len(arrays) == 1 and jnp.issubdtype(arrays[0].dtype, jnp.floating):
        return (~jnp.isfinite(jnp.sum(2.0**-40 * widen(arrays[0])))).astype(jnp.int8)
    return jnp.max(functools.reduce(jnp.logical_or, (~jnp.isfinite(x) for x in arrays)).astype(jnp.int8))


def traced_once(step: Step, *trees: Any) -> Step:
    """`step`, traced once however often it is called under jit. `trees` are what it works on."""
    return jax.jit(step) if any(map(is_traced, jax.tree.leaves(trees))) else step


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


def params_if(
    wanted: jax.Array, take: Step, leave: Step, grads: optax.Updates, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """`step_if` for steps that give parameters.

    Args:
        wanted: as for `step_if`.
        take: ``take() -> (params, state)``.
        leave: the like.
        grads: tree of gradients. Where one is None anything may stand in `params`, such as a function: it is returned
            as it is, and is no part of the branch.
        params: tree of parameters before the step.
    """
    leaves, structure = jax.tree.flatten(grads, is_leaf=is_none)
    before = counterparts(grads, params, "params")

    def moving(way: Step) -> tuple[list[Any], optax.OptState]:
        new, state = way()
        pairs = zip(leaves, structure.flatten_up_to(new), strict=True)
        return [as_array(p) for g, p in pairs if g is not None], state

    new, state = step_if(wanted, functools.partial(moving, take), functools.partial(moving, leave))
    moved = iter(new)
    return structure.unflatten(p if g is None else next(moved) for g, p in zip(leaves, before, strict=True)), state


def no_updates(gradients: optax.Updates, like: optax.Updates) -> optax.Updates:
    """Updates of the dtypes of `like` that move nothing, where the gradients are.

    They are -0, for 0 + -0 is 0 and -0 + -0 is -0: weights stay as they are, to the bit.
    """

    def nothing(g: Any, u: Any) -> Any:
        if u is None:
            return None
        return jnp.full_like(as_array(g), -0.0, u.dtype)

    return jax.tree.map(nothing, gradients, like, is_leaf=is_none)


def branched(wanted: jax.Array, take: Step, leave: Step) -> tuple[optax.Updates, optax.OptState]:
    """One of the two is run."""
    return jax.lax.cond(wanted, take, leave)


def undone(wanted: jax.Array, take: Step, leave: Step) -> tuple[optax.Updates, optax.OptState]:
    """Both are."""
    return jax.tree.map(functools.partial(jnp.where, wanted), take(), leave())
