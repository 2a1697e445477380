"""LaProp: RMSProp's normalized gradient, then momentum. Adam takes the momentum first.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    n      = g / (sqrt(v / c2) + eps)
    m      <- (1 - b1) n + b1 m
    u      = m / c1

Each gradient is divided by the root mean square of its own time, so that a change of scale does not make old gradients
in m count for more or less than they did. |u| stays below 1 / sqrt(1 - b2) for any b1; Adam's does only for b1 <
sqrt(b2). ``mu`` has no unit, where Adam's has the gradient's.

Ziyin, Wang & Ueda 2020, arXiv:2002.04839, Algorithm 1.

Deviation: the authors' program averages the learning rate into m, so that a larger one of the past is remembered. The
paper's algorithm has a constant one; here it multiplies u, as everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import total_weight, update_moment
from adamite.regularization import add_decayed_weights
from adamite.storage import Dense


def laprop_rule(*, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any]:
        return total_weight(b1, t), total_weight(b2, t)

    def step(scalars: tuple[Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2 = scalars
        v = update_moment(g, v, b2, order=2)
        n = g / (jnp.sqrt(v / c2) + eps)
        m = update_moment(n, m, b1, order=1)
        u = m / c1
        return u, m, v

    return Rule(scalars, step)


@described
def scale_by_laprop(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-15,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """LaProp's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: in [0, 1), per step: how much of the mean normalized gradient is kept.
        b2: see `adamite.scale_by_adam`, as for the two that follow.
        eps: see `adamite.scale_by_adam`.
        mu_dtype: see `adamite.scale_by_adam`.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state has the class and the shapes of that of `adamite.scale_by_adam`. Errors are those
        of `adamite.scale_by_adam`.

    Example:
        A gradient a thousand times smaller counts for its sign at once where b2 is small; Adam still follows the old:

        >>> from adamite import scale_by_adam
        >>> for tx in (scale_by_laprop(b2=0.0), scale_by_adam(b2=0.0)):
        ...     _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
        ...     direction, _ = tx.update(jnp.array([-1e-3]), state)
        ...     print(direction.round(1))
        [-0.1]
        [473.2]
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    eps, mu_dtype = checks.non_negative("eps", eps), checks.floating_dtype("mu_dtype", mu_dtype)

    rule = laprop_rule(b1=b1, b2=b2, eps=eps)
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(mu_dtype), "nu": Dense(unsigned=True)}, moments)


@described
def laprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-15,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """LaProp, with decoupled weight decay if asked for.

    Arguments, state and errors are those of `adamite.adamw` and `scale_by_laprop`; its update needs `params`.

    Example:
        >>> tx, params = laprop(0.1, weight_decay=0.5), jnp.array([2.0, -4.0])
        >>> updates, _ = tx.update(jnp.array([7.0, 0.0]), tx.init(params), params)
        >>> print(updates.round(3))
        [-0.2  0.2]
    """
    return chain(
        scale_by_laprop(b1, b2, eps, mu_dtype, moments=moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
