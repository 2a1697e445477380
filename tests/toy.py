"""Signum: steps of one size, in the direction of the mean gradient's sign.

At step t = 1, 2, ... with gradient g:

    m <- (1 - b1) g + b1 m
    u  = sign(m)

Bernstein et al. 2018, arXiv:1802.04434, Algorithm 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Rule, chain, from_rule
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import update_moment
from adamite.storage import Dense


class ScaleBySignumState(NamedTuple):
    """State of Signum."""

    count: jax.Array  # int32, shape ()
    mu: Any  # tree of the parameters' shapes, at least float32


def signum_rule(*, b1: jax.typing.ArrayLike) -> Rule:
    """The equations above."""

    def step(_: tuple[()], g: Any, m: Any) -> tuple[Any, Any]:
        m = update_moment(g, m, b1, order=1)
        u = jnp.sign(m)
        return u, m

    return Rule(lambda t: (), step)


def scale_by_signum(b1: jax.typing.ArrayLike = 0.9) -> optax.GradientTransformationExtraArgs:
    """The sign of the mean gradient; `b1` in [0, 1), per step, is how much of the mean is kept."""
    return from_rule(signum_rule(b1=checks.decay_rate("b1", b1)), ScaleBySignumState, {"mu": Dense()})


def signum(
    learning_rate: optax.ScalarOrSchedule, b1: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Signum; see `scale_by_signum` and `scale_by_learning_rate`."""
    return chain(scale_by_signum(b1), scale_by_learning_rate(learning_rate))
