"""Lion: every coordinate moves by the learning rate, in the direction of its momentum's sign.

At step t = 1, 2, ... with gradient g:

    c <- (1 - b1) g + b1 m
    u = sign(c)                                     mode "smooth": tanh(smooth_beta c); "refined": c where |c| < 1
    m <- (1 - b2) g + b2 m

m, the only moment, is the state's ``mu``. For complex c, sign(c) = c / |c|, and tanh(c) stands for sign(c) tanh(|c|).

Chen et al. 2023, arXiv:2302.06675, Algorithm 2. With decay: parameters move by -learning_rate (u + weight_decay p),
as there.

Deviations from the paper:

1. The modes "smooth" and "refined" are optax's; with them the gradient's scale matters.
2. A complex tanh, which has poles, is not optax's: here it keeps c's angle.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import update_moment
from adamite.regularization import add_decayed_weights
from adamite.storage import Dense


def lion_rule(
    *, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, mode: str, smooth_beta: jax.typing.ArrayLike
) -> Rule:
    """The equations above."""
    direction = {
        "hard": jnp.sign,
        "smooth": lambda c: _tanh(smooth_beta * c),
        "refined": lambda c: jnp.where(jnp.abs(c) < 1, c, jnp.sign(c)),
    }[mode]

    def scalars(t: jax.Array) -> tuple[()]:
        del t
        return ()

    def step(scalars: tuple[()], g: Any, m: Any) -> tuple[Any, Any]:
        del scalars
        c = update_moment(g, m, b1, order=1)
        u = direction(c)
        m = update_moment(g, m, b2, order=1)
        return u, m

    return Rule(scalars, step)


@described
def scale_by_lion(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: jax.typing.ArrayLike = 1.0,
    moments: Any = "float32",
) -> Optimizer:
    """Lion's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: in [0, 1): the momentum's share in the direction; the gradient has the rest.
        b2: in [0, 1), per step: how much of the momentum is kept. Its memory is 1 / (1 - b2) steps.
        mu_dtype: see `adamite.scale_by_adam`.
        mode: "hard" for the sign, "smooth" for a tanh, "refined" for a line from -1 to 1.
        smooth_beta: finite, >= 0, in 1 / (the gradient's unit): the tanh's slope at 0. Of mode "smooth" alone.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.ScaleByLionState(count, mu)``: int32 of shape (), and a tree of the
        parameters' structure and shapes, at least float32. Errors are those of `adamite.scale_by_adam`.

    Example:
        >>> for mode in ("hard", "smooth", "refined"):
        ...     tx = scale_by_lion(mode=mode)
        ...     direction, state = tx.update(jnp.array([1e-3, -8.0, 20.0]), tx.init(jnp.zeros(3)))
        ...     print(direction.round(1))
        [ 1. -1.  1.]
        [ 0.  -0.7  1. ]
        [ 0.  -0.8  1. ]
    """
    rule = lion_rule(
        b1=checks.decay_rate("b1", b1),
        b2=checks.decay_rate("b2", b2),
        mode=checks.one_of("mode", mode, ("hard", "smooth", "refined")),
        smooth_beta=checks.non_negative("smooth_beta", smooth_beta),
    )
    return from_rule(rule, optax.ScaleByLionState, {"mu": Dense(checks.floating_dtype("mu_dtype", mu_dtype))}, moments)


@described
def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Lion: a drop-in for ``optax.lion``. Its update needs `params`.

    Arguments and errors are those of `scale_by_lion`; `learning_rate`, `weight_decay` and `mask` are `adamite.adamw`'s.
    Coming from AdamW, take a learning rate 3 to 10 times smaller and a weight decay as many times larger.

    Example:
        >>> tx, params = lion(0.1, weight_decay=0.5), jnp.array([2.0, 4.0])
        >>> print(tx.update(jnp.array([1e-5, -7.0]), tx.init(params), params)[0])
        [-0.2 -0.1]
    """
    direction, decay = scale_by_lion(b1, b2, mu_dtype, moments=moments), add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate), rounding=rounding)


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.tanh(jnp.abs(x)) if jnp.iscomplexobj(x) else jnp.tanh(x)
