"""StableAdamW: AdamW that takes shorter steps while the gradient is larger than its average says.

At step t = 1, 2, ... with gradient g of one leaf:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    s      = sqrt(v / c2)
    r      = sqrt(mean((|g| / max(s, eps))^2))      over all elements of the leaf
    u      = (m / c1) / (s + eps) / max(1, r)

r is about 1 in steady state. When a leaf's gradients jump, v is out of date and r large: the update is divided by it,
as Adafactor's is. With it, no clipping of gradients is needed.

Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2 (its v and u are our m / c1 and v / c2, averaged with decay rates
b (1 - b^(t-1)) / (1 - b^t), which is the same).

Deviation: the paper divides the learning rate by max(1, r), and so the weight decay, too. Here a decay is a part of its
own, which does not know r: in the steps in which r > 1, it is r times the paper's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import over_devices, total_weight, update_moment
from adamite.regularization import add_decayed_weights
from adamite.storage import Dense


def stable_adam_rule(
    *, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike, axes: tuple[str, ...] = ()
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any]:
        return total_weight(b1, t), total_weight(b2, t)

    def step(scalars: tuple[Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2 = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(g, v, b2, order=2)
        s = jnp.sqrt(v / c2)
        squares = jnp.sum((jnp.abs(g) / jnp.maximum(s, eps)) ** 2)
        r = jnp.sqrt(over_devices(squares, g, axes) / over_devices(float(g.size), g, axes))
        u = (m / c1) / (s + eps) / jnp.maximum(1, r)
        return u, m, v

    return Rule(scalars, step, elementwise=False)


@described
def scale_by_stable_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """StableAdamW's direction, not yet scaled by a learning rate nor negated, without the decay.

    Args:
        b1: see `adamite.scale_by_adam`, as for the three that follow.
        b2: see `adamite.scale_by_adam`.
        eps: see `adamite.scale_by_adam`. With 0, one element that never had a gradient makes its whole leaf NaN.
        mu_dtype: see `adamite.scale_by_adam`.
        moments: see `adamite.scale_by_adam`.
        axis_name: see `adamite.scale_by_trust_ratio`; r is then of the whole leaf.

    Returns:
        The transformation. Its state is that of `adamite.scale_by_adam`. Errors are those of `adamite.scale_by_adam`.

    Example:
        After fifty gradients of 1 comes one of 1000. Adam's direction would be 0.63; r is 6.3, and divides it:

        >>> tx = scale_by_stable_adam()
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in 50 * [1.0] + [1000.0]:
        ...     direction, state = tx.update(jnp.array([g]), state)
        >>> print(f"{direction[0]:.2f}")
        0.10
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    eps, mu_dtype = checks.non_negative("eps", eps), checks.floating_dtype("mu_dtype", mu_dtype)

    rule = stable_adam_rule(b1=b1, b2=b2, eps=eps, axes=checks.axis_name(axis_name))
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(mu_dtype), "nu": Dense(unsigned=True)}, moments)


@described
def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """StableAdamW: update clipping and decoupled weight decay.

    Arguments, state and errors are those of `adamite.adamw` and `scale_by_stable_adam`; its update needs `params`.

    Example:
        >>> tx, params = stable_adamw(0.1, weight_decay=0.5), jnp.array([2.0, -4.0])
        >>> updates, _ = tx.update(jnp.array([7.0, 0.0]), tx.init(params), params)
        >>> print(updates.round(3))
        [-0.2  0.2]
    """
    return chain(
        scale_by_stable_adam(b1, b2, eps, mu_dtype, moments=moments, axis_name=axis_name),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
