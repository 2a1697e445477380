"""Adam-atan2: Adam with an arctangent for the division, so that there is no epsilon to tune.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    u      = a atan2(m / c1, b sqrt(v / c2))        for complex m: of |m|, times m / |m|

Where m is small beside sqrt(v) this is (a / b) times Adam's m / sqrt(v); |u| never exceeds a pi / 2. Gradients that are
all scaled by a constant give the same u. In float32 that ends below |g| = 1e-19, where g^2 is 0 and |u| is a pi / 2.

Everett et al. 2024, arXiv:2407.05872. a = b = 1, the default, puts atan2 for the division and changes nothing else.
Many implementations have a = 4 / pi, with which |u| is 1 where |m| = sqrt(v), as it is in Adam's first step.
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


def adam_atan2_rule(
    *, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, a: jax.typing.ArrayLike, b: jax.typing.ArrayLike
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any]:
        return total_weight(b1, t), total_weight(b2, t)

    def step(scalars: tuple[Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2 = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(g, v, b2, order=2)
        u = a * _atan2(m / c1, b * jnp.sqrt(v / c2))
        return u, m, v

    return Rule(scalars, step)


@described
def scale_by_adam_atan2(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    a: jax.typing.ArrayLike = 1.0,
    b: jax.typing.ArrayLike = 1.0,
    moments: Any = "float32",
) -> Optimizer:
    """Adam-atan2's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`, as for the two that follow.
        b2: see `adamite.scale_by_adam`.
        mu_dtype: see `adamite.scale_by_adam`.
        a: finite, >= 0: the scale of the direction, which is at most a pi / 2.
        b: finite, >= 0: how soon it saturates. ``a = b`` is Adam's size for small m, and Adam itself as both grow.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is that of `adamite.scale_by_adam`. Errors are those of `adamite.scale_by_adam`.

    Example:
        After one step the direction is pi / 4 times the gradient's sign, whatever its size:

        >>> tx = scale_by_adam_atan2()
        >>> g = jnp.array([1e-12, -20.0, 0.0])
        >>> direction, state = tx.update(g, tx.init(jnp.zeros(3)))
        >>> print(direction.round(3))
        [ 0.785 -0.785  0.   ]
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    a, b = checks.non_negative("a", a), checks.non_negative("b", b)
    mu_dtype = checks.floating_dtype("mu_dtype", mu_dtype)

    rule = adam_atan2_rule(b1=b1, b2=b2, a=a, b=b)
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(mu_dtype), "nu": Dense(unsigned=True)}, moments)


@described
def adam_atan2(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    a: jax.typing.ArrayLike = 1.0,
    b: jax.typing.ArrayLike = 1.0,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Adam-atan2, with decoupled weight decay if asked for.

    Arguments, state and errors are those of `adamite.adamw` and `scale_by_adam_atan2`; its update needs `params`.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = adam_atan2(0.1), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        scale_by_adam_atan2(b1, b2, mu_dtype, a=a, b=b, moments=moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )


def _atan2(m: Any, s: Any) -> jax.Array:
    return jnp.sign(m) * jnp.arctan2(jnp.abs(m), s) if jnp.iscomplexobj(m) else jnp.arctan2(m, s)
