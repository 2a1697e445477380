"""AdaMax: Adam that divides by the largest recent gradient instead of the root mean square.

At step t = 1, 2, ... with gradient g:

    c1 = 1 - b1^t
    m  <- (1 - b1) g + b1 m
    v  <- max(|g| + eps, b2 v)
    u  = (m / c1) / v

v is in the gradient's unit, a maximum that fades by b2 a step; it starts at 0 and needs no bias correction. m and v are
the state's ``mu`` and ``nu``.

Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2. Decoupled decay: Loshchilov & Hutter 2019, arXiv:1711.05101.

Deviations from the papers, all of them optax's too:

1. eps is not in the paper; it stands inside the maximum, as in torch. With eps = 0 a coordinate that never had a
   gradient moves by 0 / 0.
2. Weight decay is multiplied by the learning rate; the paper multiplies it by the schedule's factor alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import power, update_moment
from adamite.regularization import add_decayed_weights
from adamite.storage import Dense


def adamax_rule(*, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any]:
        return (1 - power(b1, t),)

    def step(scalars: tuple[Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        (c1,) = scalars
        m = update_moment(g, m, b1, order=1)
        v = jnp.maximum(jnp.abs(g) + eps, b2 * v)
        u = (m / c1) / v
        return u, m, v

    return Rule(scalars, step)


@described
def scale_by_adamax(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """AdaMax's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`.
        b2: in [0, 1), per step: how much of the largest gradient is kept. Its memory is 1 / (1 - b2) steps.
        eps: finite, >= 0, in the gradient's unit: added to every gradient's size.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByAdamState(count, mu, nu)``: int32 of shape (), and two trees of
        the parameters' structure and shapes, at least float32; ``nu`` is real. Errors are those of
        `adamite.scale_by_adam`.

    Example:
        After a large gradient the next ones count for little:

        >>> tx = scale_by_adamax(b1=0.0)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (1.0, 10.0, -1.0):
        ...     direction, state = tx.update(jnp.array([g]), state)
        ...     print(direction.round(3))
        [1.]
        [1.]
        [-0.1]
    """
    b1, b2, eps = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2), checks.non_negative("eps", eps)
    rule = adamax_rule(b1=b1, b2=b2, eps=eps)
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(), "nu": Dense(unsigned=True)}, moments)


@described
def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """AdaMax: a drop-in for ``optax.adamax``.

    Arguments and errors are those of `scale_by_adamax`; `learning_rate` is `adamite.adam`'s. The state is a tuple:
    that of `scale_by_adamax`, then that of `adamite.scale_by_learning_rate`.

    Example:
        The first step is the learning rate, whatever the gradient's size:

        >>> tx = adamax(0.1)
        >>> updates, _ = tx.update(jnp.array([1e-3, -20.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(3))
        [-0.1  0.1]
    """
    return chain(
        scale_by_adamax(b1, b2, eps, moments=moments), scale_by_learning_rate(learning_rate), rounding=rounding
    )


@described
def adamaxw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """AdaMax with decoupled weight decay: a drop-in for ``optax.adamaxw``. Its update needs `params`.

    Arguments and errors are those of `adamax`; `weight_decay` and `mask` are `adamite.adamw`'s, as is the example.
    """
    direction, decay = scale_by_adamax(b1, b2, eps, moments=moments), add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate), rounding=rounding)
