"""Scaling by the learning rate: the last part of every optimizer, u <- -learning_rate u."""

import optax

from adamite import checks
from adamite.core import Optimizer, by_number
from adamite.core.rates import note_rate
from adamite.identity import described


@described
def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule, *, flip_sign: bool = True) -> Optimizer:
    """Multiply updates by minus the learning rate, in float32: a drop-in for ``optax.scale_by_learning_rate``.

    Args:
        learning_rate: a finite number >= 0, an array of shape (), or a schedule: a function from the number of updates
            so far (int32, shape ()) to the learning rate.
        flip_sign: multiply by minus the learning rate, so that applying the updates goes downhill.

    Returns:
        The transformation. Its state is ``optax.EmptyState`` or, for a schedule, ``optax.ScaleByScheduleState``.

    Raises:
        ValueError: the learning rate is negative, not finite or not of shape ().
        TypeError: it is None, a string, a boolean or another wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, transition_steps=4))
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.array([1.0, -2.0]), state)
        ...     print(updates)
        [-1.  2.]
        [-0.75  1.5 ]
        [-0.5  1. ]
    """
    sign = -1 if checks.flag("flip_sign", flip_sign) else 1
    return by_number(lambda u, _, s: s * u, checks.learning_rate(learning_rate), sign=sign, note=note_rate)
