"""Rectified Adam: momentum until the second moment can be trusted, then Adam, warmed up by how far it can.

At step t = 1, 2, ... with gradient g, and rho_inf = 2 / (1 - b2) - 1:

    c1, c2 = 1 - b1^t, 1 - b2^t
    rho    = rho_inf - 2 t b2^t / c2
    r      = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    m_hat  = m / c1                                 with Nesterov: b1 (m / (1 - b1^(t+1))) + (1 - b1) (g / c1)
    u      = r m_hat / (sqrt(v / c2 + eps_root) + eps) if rho >= threshold, else m_hat

rho is about the number of gradients that v averages: near t at first, rho_inf in the end; r rises to 1. Where rho_inf
is below the threshold (b2 <= 2/3 at 5) every step is momentum's. m and v are the state's ``mu`` and ``nu``.

Liu et al. 2020, arXiv:1908.03265, Algorithm 2.

Deviations from the paper, the first two optax's too:

1. The paper rectifies where rho > 4; the threshold is 5, its authors' program's.
2. eps, eps_root and Nesterov's momentum are not in the paper.
3. A threshold below 4 is refused: r would be the root of a negative number.
4. Where r is not used it is 1, not NaN, so that derivatives through the step are finite.
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
from adamite.storage import Dense


def radam_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    threshold: jax.typing.ArrayLike,
    nesterov: bool,
) -> Rule:
    """The equations above."""
    rho_inf = 2 / (1 - b2) - 1

    def scalars(t: jax.Array) -> tuple[Any, Any, Any, Any, Any]:
        b2_to_t = power(b2, t)
        c1, c2 = 1 - power(b1, t), 1 - b2_to_t
        c1_next = (1 - power(b1, optax.safe_increment(t))) if nesterov else 1
        rho = rho_inf - 2 * t * b2_to_t / c2
        trusted = rho >= threshold
        square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        r = jnp.sqrt(jnp.where(trusted, square, 1))
        return c1, c2, c1_next, trusted, r

    def step(scalars: tuple[Any, Any, Any, Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2, c1_next, trusted, r = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(g, v, b2, order=2)
        m_hat = b1 * (m / c1_next) + (1 - b1) * (g / c1) if nesterov else m / c1
        u = jnp.where(trusted, r * m_hat / (jnp.sqrt(v / c2 + eps_root) + eps), m_hat)
        return u, m, v

    return Rule(scalars, step)


@described
def scale_by_radam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    threshold: jax.typing.ArrayLike = 5.0,
    *,
    nesterov: bool = False,
    moments: Any = "float32",
) -> Optimizer:
    """Rectified Adam's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`, as for the three that follow.
        b2: see `adamite.scale_by_adam`.
        eps: see `adamite.scale_by_adam`.
        eps_root: see `adamite.scale_by_adam`.
        threshold: finite, >= 4, in gradients: how many the second moment must average before it is divided by.
        nesterov: see `adamite.scale_by_adam`.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByAdamState(count, mu, nu)``: int32 of shape (), and two trees of
        the parameters' structure and shapes, at least float32; ``nu`` is real. Errors are those of
        `adamite.scale_by_adam`.

    Example:
        Five steps follow the mean gradient; the sixth is Adam's, 1, times a small r:

        >>> tx = scale_by_radam()
        >>> state = tx.init(jnp.zeros(1))
        >>> for t in range(1, 7):
        ...     direction, state = tx.update(jnp.array([20.0]), state)
        ...     if t >= 5:
        ...         print(t, direction.round(2))
        5 [20.]
        6 [0.03]
    """
    rule = radam_rule(
        b1=checks.decay_rate("b1", b1),
        b2=checks.decay_rate("b2", b2),
        eps=checks.non_negative("eps", eps),
        eps_root=checks.non_negative("eps_root", eps_root),
        threshold=checks.at_least("threshold", threshold, 4),
        nesterov=checks.flag("nesterov", nesterov),
    )
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(), "nu": Dense(unsigned=True)}, moments)


@described
def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    threshold: jax.typing.ArrayLike = 5.0,
    *,
    nesterov: bool = False,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Rectified Adam: a drop-in for ``optax.radam``.

    Arguments and errors are those of `scale_by_radam`; `learning_rate` is `adamite.adam`'s. The state is a tuple: that
    of `scale_by_radam`, then that of `adamite.scale_by_learning_rate`.

    Example:
        The first step is the learning rate times the gradient:

        >>> tx = radam(0.1)
        >>> updates, _ = tx.update(jnp.array([1.0, -20.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(3))
        [-0.1  2. ]
    """
    return chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov, moments=moments),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
