"""AdaBelief: Adam whose second moment measures how far a gradient is from the expected one, not how large it is.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m      <- (1 - b1) g + b1 m
    s      <- (1 - b2) (g - m)^2 + b2 s + eps_root  for complex g: |g - m|^2
    m_hat  = m / c1                                 with Nesterov: b1 (m / (1 - b1^(t+1))) + (1 - b1) (g / c1)
    u      = m_hat / (sqrt(s / c2) + eps)

eps_root is added at every step, so that s / c2 is never below eps_root / (1 - b2). m and s are the state's ``mu`` and
``nu``.

Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2.

Deviations from the paper, all of them optax's too:

1. The paper has one eps, in both places; its default is 1e-8.
2. Nesterov's momentum is not in the paper.
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


def adabelief_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    nesterov: bool,
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any, Any]:
        return 1 - power(b1, t), 1 - power(b2, t), (1 - power(b1, optax.safe_increment(t))) if nesterov else 1

    def step(scalars: tuple[Any, Any, Any], g: Any, m: Any, s: Any) -> tuple[Any, Any, Any]:
        c1, c2, c1_next = scalars
        m = update_moment(g, m, b1, order=1)
        s = update_moment(g - m, s, b2, order=2) + eps_root
        m_hat = b1 * (m / c1_next) + (1 - b1) * (g / c1) if nesterov else m / c1
        u = m_hat / (jnp.sqrt(s / c2) + eps)
        return u, m, s

    return Rule(scalars, step)


@described
def scale_by_belief(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    *,
    nesterov: bool = False,
    moments: Any = "float32",
) -> Optimizer:
    """AdaBelief's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`.
        b2: in [0, 1), per step: how much of the mean squared error of the mean gradient is kept.
        eps: finite, >= 0: added to the root.
        eps_root: finite, >= 0, in the squared gradient's unit: added to the second moment at every step.
        nesterov: see `adamite.scale_by_adam`.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByBeliefState(count, mu, nu)``: int32 of shape (), and two trees
        of the parameters' structure and shapes, at least float32; ``nu`` is real. Errors are those of
        `adamite.scale_by_adam`.

    Example:
        Of two gradients of one size the steady one moves further than the one that alternates:

        >>> tx = scale_by_belief()
        >>> state = tx.init(jnp.zeros(2))
        >>> for t in range(100):
        ...     direction, state = tx.update(jnp.array([1.0, (-1.0) ** t]), state)
        >>> print(direction.round(2))
        [ 4.96 -0.06]
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    eps, eps_root = checks.non_negative("eps", eps), checks.non_negative("eps_root", eps_root)
    rule = adabelief_rule(b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=checks.flag("nesterov", nesterov))
    return from_rule(rule, optax.ScaleByBeliefState, {"mu": Dense(), "nu": Dense(unsigned=True)}, moments)


@described
def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    *,
    nesterov: bool = False,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """AdaBelief: a drop-in for ``optax.adabelief``.

    Arguments and errors are those of `scale_by_belief`; `learning_rate` is `adamite.adam`'s.

    Example:
        Longer than Adam's first step, for a tenth of the gradient was expected:

        >>> tx = adabelief(0.1)
        >>> print(tx.update(jnp.array([1.0, -20.0]), tx.init(jnp.zeros(2)))[0].round(2))
        [-0.11  0.11]
    """
    return chain(
        scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov, moments=moments),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
