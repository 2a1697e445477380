"""Cautious steps: only where the optimizer and the gradient agree, and the longer there.

    keep = u g > 0                                  for complex u, g: the real part of u* g
    u    <- (u if keep else 0) n / (k + 1)          n elements in the leaf, k of them kept

u is a direction, g the gradient it was made from. Momentum carries u past the point where g has turned; there the step
would go uphill, and is left out. The factor keeps the mean size of a step, but halves it
in a leaf of one element. Where g is 0 nothing moves.

Liang, Chen, Liu & Liu 2024, arXiv:2411.16085, Algorithm 1. There the factor is n / (k + n eps); k + 1 is the authors'
program's, and has nothing to choose.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, rounds_weights, uphold
from adamite.identity import described
from adamite.numerics import cast, over_devices


@described
def cautious(tx: optax.GradientTransformation, *, axis_name: str | tuple[str, ...] | None = None) -> Optimizer:
    """`tx`, its updates left out where they disagree with the gradients.

    Args:
        tx: a transformation from gradients to directions: any ``scale_by_*``, not yet negated. Weight decay and
            `adamite.scale_by_learning_rate` come after it: behind the minus sign nothing would agree with a gradient.
        axis_name: see `adamite.scale_by_trust_ratio`; the factor is then of the whole leaf.

    Returns:
        The transformation. Its state is that of `tx`, unchanged.

    Raises:
        ValueError: `tx` rounds weights.
        TypeError: `tx` is not a gradient transformation; at update, a leaf is the wrong kind of thing.

    Example:
        The second gradient turns in the first element, where Adam still goes on:

        >>> from adamite import scale_by_adam
        >>> for tx in (scale_by_adam(), cautious(scale_by_adam())):
        ...     state = tx.init(jnp.zeros(2))
        ...     for g in ([1.0, 1.0], [-0.1, 1.0]):
        ...         direction, state = tx.update(jnp.array(g), state)
        ...     print(direction.round(1))
        [0.6 1. ]
        [0. 1.]
    """
    inner = optax.with_extra_args_support(checks.transformation("tx", tx))
    if rounds_weights(tx):
        raise ValueError("tx rounds weights, and must be a direction: give rounding= to the chain around cautious(tx)")
    axes = checks.axis_name(axis_name)

    def agreeing(u: jax.Array, g: jax.Array) -> jax.Array:
        keep = (u.conj() * jnp.sign(g)).real > 0  # the sign: u g may underflow
        kept = over_devices(cast(jnp.count_nonzero(keep), u.real.dtype), u, axes)
        return jnp.where(keep, u, 0) * (over_devices(float(u.size), u, axes) / (kept + 1))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        directions, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(agreeing, directions, updates), state

    return uphold(optax.GradientTransformationExtraArgs(inner.init, update))
