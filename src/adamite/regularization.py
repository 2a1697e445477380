"""Regularization as a part of its own, to be chained where it should act.

Decoupled weight decay, after the moments and before the learning rate: u <- u + weight_decay p. Every weight shrinks at
the same relative rate; inside the gradient (L2) Adam would divide the decay by sqrt(v) and spare exactly the weights
with large gradients. Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.
"""

from typing import Any

import jax
import optax

from adamite import checks
from adamite.engine import uphold
from adamite.engine.matching import counterparts
from adamite.numerics import widen


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Add ``weight_decay`` times the parameters to the updates: optax's, in float32, its arguments checked.

    Args:
        weight_decay: a finite number >= 0, an array of shape (), or a schedule.
        mask: which leaves decay: a tree of booleans with the structure of the parameters (or a prefix of it), or a
            function from the parameters to one. None: all.

    Returns:
        The transformation. Its update needs `params`.

    Raises:
        ValueError: `weight_decay` is negative or not finite; at update, `params` is missing or differs in a shape.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = add_decayed_weights(0.1, mask={"w": True, "b": False})
        >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
        >>> updates, _ = tx.update({"w": jnp.zeros(2), "b": jnp.zeros(2)}, tx.init(params), params)
        >>> print(updates["w"], updates["b"])
        [0.1 0.1] [0. 0.]
    """
    weight_decay = checks.non_negative_or_schedule("weight_decay", weight_decay)
    inner = optax.with_extra_args_support(optax.add_decayed_weights(weight_decay, checks.mask(mask)))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(updates, state, params)")
        counterparts(updates, params, "params")
        return inner.update(updates, state, jax.tree.map(widen, params), **extra_args)

    return uphold(optax.GradientTransformationExtraArgs(inner.init, update))
