"""Adagrad: each coordinate steps by its gradient over the root of the sum of all its squared gradients so far.

At each step, with gradient g:

    s <- g^2 + s                                    for complex g: |g|^2
    u  = g / sqrt(s + eps)                          0 where s = 0

The parameters then move by -learning_rate u. s is the state's ``sum_of_squares``; it starts at
``initial_accumulator_value`` and never falls, so that the steps shrink like 1 / sqrt(t).

Duchi, Hazan & Singer 2011, jmlr.org/papers/v12/duchi11a.html, Figure 1, with diagonal matrices.

Deviations from the paper, both of them optax's too:

1. The paper adds a constant outside the root, delta + sqrt(s); here it is inside, eps and the initial value together.
2. Neither its projection onto a set nor its regularizer is here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import abs_sq
from adamite.storage import Dense


def rss_rule(*, eps: jax.typing.ArrayLike) -> Rule:
    """The equations above."""

    def step(_: tuple[()], g: Any, s: Any) -> tuple[Any, Any]:
        s = abs_sq(g) + s
        u = jnp.where(s > 0, jax.lax.rsqrt(s + eps), 0.0) * g
        return u, s

    return Rule(lambda: (), step)


@described
def scale_by_rss(
    initial_accumulator_value: jax.typing.ArrayLike = 0.1, eps: jax.typing.ArrayLike = 1e-7, *, moments: Any = "float32"
) -> Optimizer:
    """Adagrad's direction, not yet scaled by a learning rate nor negated.

    Args:
        initial_accumulator_value: finite, >= 0, in the squared gradient's unit: what the sum starts from. Gradients
            much below its root move little at first. torch starts from 0.
        eps: finite, >= 0, in the squared gradient's unit: added inside the root.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByRssState(sum_of_squares)``, a tree of the parameters' structure
        and shapes, at least float32 and real. Errors are those of `adamite.scale_by_adam`.

    Example:
        Under a constant gradient of any size the t-th direction is 1 / sqrt(t):

        >>> tx = scale_by_rss(initial_accumulator_value=0.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(4):
        ...     direction, state = tx.update(jnp.array([0.1, -20.0]), state)
        >>> print(direction.round(3))
        [ 0.5 -0.5]
    """
    initial = checks.non_negative("initial_accumulator_value", initial_accumulator_value)
    rule = rss_rule(eps=checks.non_negative("eps", eps))
    return from_rule(rule, optax.ScaleByRssState, {"sum_of_squares": Dense(unsigned=True, initial=initial)}, moments)


@described
def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Adagrad: a drop-in for ``optax.adagrad``.

    Arguments and errors are those of `scale_by_rss`; `learning_rate` is `adamite.adam`'s. The state is a tuple: that
    of `scale_by_rss`, then that of `adamite.scale_by_learning_rate`.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = adagrad(1.0), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        scale_by_rss(initial_accumulator_value, eps, moments=moments),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
