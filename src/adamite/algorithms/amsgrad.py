"""AMSGrad: Adam that divides by the largest root mean square gradient so far, so that no step grows again.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t                     1 where that bias correction is off
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    v_max  <- max(v_max, v / c2)                    with max_before_correction: max(v_max, v)
    v_hat  = v_max                                  with max_before_correction: v_max / c2
    u      = (m / c1) / (sqrt(v_hat + eps_root) + eps)

The two conventions: optax takes the maximum after the correction, which is the default; torch before it, which is
``max_before_correction=True`` (``torch.optim.Adam(amsgrad=True)``). Before it the early gradients, which c2 magnifies,
do not decide the maximum for good, but v_hat falls while c2 rises.

Reddi, Kale & Kumar 2018, arXiv:1904.09237, Algorithm 2.

Deviations from the paper, all of them optax's too:

1. The bias corrections are not in the paper: turn both off for its algorithm. The two conventions are then one.
2. Neither eps nor eps_root is in the paper.
3. b1 does not vary with t.
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


def amsgrad_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    max_before_correction: bool,
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any]:
        return 1 - power(b1, t) if bias_correction_mu else 1, 1 - power(b2, t) if bias_correction_nu else 1

    def step(scalars: tuple[Any, Any], g: Any, m: Any, v: Any, v_max: Any) -> tuple[Any, Any, Any, Any]:
        c1, c2 = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(g, v, b2, order=2)
        v_max = jnp.maximum(v_max, v if max_before_correction else v / c2)
        v_hat = v_max / c2 if max_before_correction else v_max
        u = (m / c1) / (jnp.sqrt(v_hat + eps_root) + eps)
        return u, m, v, v_max

    return Rule(scalars, step)


@described
def scale_by_amsgrad(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_before_correction: bool = False,
    moments: Any = "float32",
) -> Optimizer:
    """AMSGrad's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: see `adamite.scale_by_adam`, as for the four that follow.
        b2: see `adamite.scale_by_adam`.
        eps: see `adamite.scale_by_adam`.
        eps_root: see `adamite.scale_by_adam`.
        mu_dtype: see `adamite.scale_by_adam`.
        bias_correction_mu: divide the mean gradient by 1 - b1^t.
        bias_correction_nu: divide the second moment, or its maximum, by 1 - b2^t.
        max_before_correction: take the maximum before that division, as torch does; optax takes it after.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByAmsgradState(count, mu, nu, nu_max)``: int32 of shape (), and
        three trees of the parameters' structure and shapes, at least float32; ``nu`` and ``nu_max`` are real. Errors
        are those of `adamite.scale_by_adam`.

    Example:
        A gradient ten times the others is remembered, even where Adam forgets within a step (b2 = 0):

        >>> tx = scale_by_amsgrad(b1=0.0, b2=0.0)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (1.0, 10.0, 1.0, 1.0):
        ...     direction, state = tx.update(jnp.array([g]), state)
        >>> print(direction.round(3))
        [0.1]
    """
    rule = amsgrad_rule(
        b1=checks.decay_rate("b1", b1),
        b2=checks.decay_rate("b2", b2),
        eps=checks.non_negative("eps", eps),
        eps_root=checks.non_negative("eps_root", eps_root),
        bias_correction_mu=checks.flag("bias_correction_mu", bias_correction_mu),
        bias_correction_nu=checks.flag("bias_correction_nu", bias_correction_nu),
        max_before_correction=checks.flag("max_before_correction", max_before_correction),
    )
    mu = Dense(checks.floating_dtype("mu_dtype", mu_dtype))
    return from_rule(
        rule, optax.ScaleByAmsgradState, {"mu": mu, "nu": Dense(unsigned=True), "nu_max": Dense(unsigned=True)}, moments
    )


@described
def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_before_correction: bool = False,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """AMSGrad: a drop-in for ``optax.amsgrad``, and torch's with ``max_before_correction=True``.

    Arguments and errors are those of `scale_by_amsgrad`; `learning_rate` is `adamite.adam`'s. The state is a tuple:
    that of `scale_by_amsgrad`, then that of `adamite.scale_by_learning_rate`.

    Example:
        The two conventions, after a large gradient and a small one:

        >>> for before in (False, True):
        ...     tx = amsgrad(0.1, b1=0.0, max_before_correction=before)
        ...     _, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
        ...     print(tx.update(jnp.array([1.0]), state)[0].round(3))
        [-0.05]
        [-0.063]
    """
    return chain(
        scale_by_amsgrad(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            bias_correction_mu,
            bias_correction_nu,
            max_before_correction=max_before_correction,
            moments=moments,
        ),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
