"""ADOPT: Adam that divides each gradient by the root mean square of those before it, and averages the quotients.

At step t = 0, 1, ... with gradient g:

    d1, d2 = b1, b2                                 at t = 0: 1, 0
    c      = clip_value_fn(t)                       itself where it is a number
    q      = clip(g / max(sqrt(v), eps), -c, c)     for complex g: its modulus
    v      <- (1 - d2) g^2 + d2 v                   for complex g: |g|^2
    m      <- (1 - d1) q + d1 m
    u      = m                                      with Nesterov: (1 - d1) q + d1 m

The parameters then move by -learning_rate u. m and v are the state's ``mu`` and ``nu``, t is its ``count`` before the
step. The first gradient only sets v: u is 0. As v does not know g, their quotient has no bias, so that ADOPT converges
whatever b2 is; for the same reason it has no bound, hence the clip.

Taniguchi et al. 2024, arXiv:2411.02853, with the clipping that its authors added in a later version.

Deviations from the paper:

1. Nesterov's momentum is not in the paper. It is optax's.
2. eps = 0, which is NaN at t = 0, is refused; complex gradients can be clipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import update_moment
from adamite.storage import Dense


def adopt_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    nesterov: bool,
    use_clipping: bool,
    clip_value_fn: optax.ScalarOrSchedule,
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any, Any]:
        c = clip_value_fn(t) if callable(clip_value_fn) else clip_value_fn
        return jnp.where(t > 0, b1, 1), jnp.where(t > 0, b2, 0), c

    def step(scalars: tuple[Any, Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        d1, d2, c = scalars
        q = g / jnp.maximum(jnp.sqrt(v), eps)
        q = _clip(q, c) if use_clipping else q
        v = update_moment(g, v, d2, order=2)
        m = update_moment(q, m, d1, order=1)
        u = update_moment(q, m, d1, order=1) if nesterov else m
        return u, m, v

    return Rule(scalars, step, first=0)


@described
def scale_by_adopt(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.9999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: optax.ScalarOrSchedule = lambda x: x**0.25,
    moments: Any = "float32",
) -> Optimizer:
    """ADOPT's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: in [0, 1), per step: how much of the mean quotient is kept.
        b2: in [0, 1), per step: how much of the mean squared gradient is kept.
        eps: finite, > 0, in the gradient's unit: the least that a gradient is divided by.
        mu_dtype: see `adamite.scale_by_adam`.
        nesterov: use Nesterov's momentum.
        use_clipping: bound the quotients. Without it an element whose first gradients are 0 can jump by g / eps.
        clip_value_fn: the bound, finite and >= 0, or a schedule: from the number of updates so far to the bound.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByAdamState(count, mu, nu)``, as `adamite.scale_by_adam`'s. Errors
        are those of `adamite.scale_by_adam`.

    Example:
        The first gradient sets the scale; the second, ten times as large, is clipped to 1:

        >>> tx = scale_by_adopt(b1=0.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (jnp.array([0.1, -20.0]), jnp.array([1.0, -20.0])):
        ...     direction, state = tx.update(g, state)
        ...     print(direction)
        [0. 0.]
        [ 1. -1.]
    """
    rule = adopt_rule(
        b1=checks.decay_rate("b1", b1),
        b2=checks.decay_rate("b2", b2),
        eps=checks.positive("eps", eps),
        nesterov=checks.flag("nesterov", nesterov),
        use_clipping=checks.flag("use_clipping", use_clipping),
        clip_value_fn=checks.non_negative_or_schedule("clip_value_fn", clip_value_fn),
    )
    mu = Dense(checks.floating_dtype("mu_dtype", mu_dtype))
    return from_rule(rule, optax.ScaleByAdamState, {"mu": mu, "nu": Dense(unsigned=True)}, moments)


@described
def adopt(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.9999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: optax.ScalarOrSchedule = lambda x: x**0.25,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """ADOPT: a drop-in for ``optax.contrib.adopt``.

    Arguments and errors are those of `scale_by_adopt`; `learning_rate` is `adamite.adam`'s. The state is a tuple: that
    of `scale_by_adopt`, then that of `adamite.scale_by_learning_rate`.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = adopt(optax.linear_schedule(0.5, 0.0, 200)), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        scale_by_adopt(
            b1,
            b2,
            eps,
            mu_dtype,
            nesterov=nesterov,
            use_clipping=use_clipping,
            clip_value_fn=clip_value_fn,
            moments=moments,
        ),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )


def _clip(x: jax.Array, bound: Any) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -bound, bound)
    modulus = jnp.abs(x)
    return x * jnp.where(modulus > bound, bound / modulus, 1)
