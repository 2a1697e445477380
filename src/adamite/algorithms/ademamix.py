"""AdEMAMix: Adam whose numerator adds a second mean gradient, with a memory of thousands of steps.

At step t = 1, 2, ... with gradient g, where b3 and alpha may vary with t:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m1     <- (1 - b1) g + b1 m1
    m2     <- (1 - b3) g + b3 m2
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    u      = (m1 / c1 + alpha m2) / (sqrt(v / c2 + eps_root) + eps)

The parameters then move by -learning_rate u. m1, m2 and v are the state's ``m1``, ``m2`` and ``nu``, t is its ``count``
after the step; b3 and alpha take their t from ``count_m2``, which counts the same.

m2 has no bias correction: it fills over 1 / (1 - b3) steps. In long trainings the paper raises alpha from 0, and b3
from b1, over the first steps.

Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1.

Deviations from the paper, the first two optax's too:

1. eps_root is not in the paper; it is 0 unless asked for.
2. Schedules see the number of updates so far, t - 1, not t.
3. mu_dtype is the dtype of m1 and m2 alone; optax keeps ``nu`` in it as well, which in bfloat16 stalls.
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


def ademamix_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    b3: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array, t_m2: jax.Array) -> tuple[Any, ...]:
        b3_now, alpha_now = (x(t_m2 - 1) if callable(x) else x for x in (b3, alpha))
        # 1 - b3 is taken here, where a number still has all its digits: of 1 - 0.9999 float32 leaves four.
        return 1 - power(b1, t), 1 - power(b2, t), 1 - b3_now, b3_now, alpha_now

    def step(scalars: tuple[Any, ...], g: Any, m1: Any, m2: Any, v: Any) -> tuple[Any, Any, Any, Any]:
        c1, c2, one_minus_b3, b3, alpha = scalars
        m1 = update_moment(g, m1, b1, order=1)
        m2 = one_minus_b3 * g + b3 * m2
        v = update_moment(g, v, b2, order=2)
        u = (m1 / c1 + alpha * m2) / (jnp.sqrt(v / c2 + eps_root) + eps)
        return u, m1, m2, v

    return Rule(scalars, step)


@described
def scale_by_ademamix(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 6.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """AdEMAMix's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`, as for the arguments not described here.
        b2: see `adamite.scale_by_adam`.
        b3: in [0, 1), per step: how much of the slow mean gradient is kept; or a schedule.
        alpha: finite, >= 0: the weight of the slow mean gradient beside the fast one's 1; or a schedule.
        eps: see `adamite.scale_by_adam`.
        eps_root: see `adamite.scale_by_adam`.
        mu_dtype: floating dtype in which ``m1`` and ``m2`` are stored. None: the parameter's, at least float32.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.contrib.ScaleByAdemamixState(count, count_m2, m1, m2, nu)``: two int32
        of shape (), and three trees of the parameters' structure and shapes, at least float32; ``nu`` is real. Errors
        are those of `adamite.scale_by_adam`.

    Example:
        With the default b3 the slow mean has taken in a ten-thousandth of the first gradient:

        >>> tx = scale_by_ademamix(alpha=100.0)
        >>> direction, state = tx.update(jnp.array([1e-3, -20.0]), tx.init(jnp.zeros(2)))
        >>> print(direction.round(4))
        [ 1.01 -1.01]
    """
    rule = ademamix_rule(
        b1=checks.decay_rate("b1", b1),
        b2=checks.decay_rate("b2", b2),
        b3=checks.decay_rate_or_schedule("b3", b3),
        alpha=checks.non_negative_or_schedule("alpha", alpha),
        eps=checks.non_negative("eps", eps),
        eps_root=checks.non_negative("eps_root", eps_root),
    )
    m = Dense(checks.floating_dtype("mu_dtype", mu_dtype))
    return from_rule(rule, optax.contrib.ScaleByAdemamixState, {"m1": m, "m2": m, "nu": Dense(unsigned=True)}, moments)


@described
def ademamix(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """AdEMAMix with decoupled weight decay: a drop-in for ``optax.contrib.ademamix``.

    Arguments and errors are those of `scale_by_ademamix`, though alpha is 5; `learning_rate`, `weight_decay` and `mask`
    are `adamite.adamw`'s. Its update needs `params`. The state is a tuple: that of `scale_by_ademamix`, of
    `adamite.add_decayed_weights` and of `adamite.scale_by_learning_rate`.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = ademamix(optax.linear_schedule(0.1, 0.0, 300), b3=0.99), jnp.zeros(2)
        >>> state, update = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(300):
        ...     updates, state = update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype, moments=moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
