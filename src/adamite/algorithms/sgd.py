"""Gradient descent with momentum: each step follows the sum of the gradients so far, older ones counting less.

At each step, with gradient g:

    m <- g + decay m
    u  = m                                          with Nesterov: g + decay m

The parameters then move by -learning_rate u; without momentum u = g. m is the state's ``trace``. Under a constant
gradient it grows to g / (1 - decay): ten times g at 0.9.

Momentum: Polyak 1964, "Some methods of speeding up the convergence of iteration methods". Nesterov's: Sutskever,
Martens, Dahl & Hinton 2013, proceedings.mlr.press/v28/sutskever13.html, in the form of Bengio, Boulanger-Lewandowski &
Pascanu 2012, arXiv:1212.0901, section 3.5, which needs the gradient at the parameters only.

Deviation from the papers, optax's and torch's too:

1. The learning rate multiplies m as a whole. In the papers it multiplies g, and stays with it while it changes.
"""

from typing import Any

import jax
import optax

from adamite import checks
from adamite.core import Optimizer, Rule, by_number, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.storage import Dense, choose


def trace_rule(*, decay: jax.typing.ArrayLike, nesterov: bool) -> Rule:
    """The equations above."""

    def step(_: tuple[()], g: Any, m: Any) -> tuple[Any, Any]:
        m = g + decay * m
        u = g + decay * m if nesterov else m
        return u, m

    return Rule(lambda: (), step)


@described
def trace(
    decay: jax.typing.ArrayLike,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """Momentum: the decaying sum of the updates so far.

    Args:
        decay: in [0, 1), per step: how much of the sum is kept.
        nesterov: look one step ahead: decay the sum once more and add the update again.
        accumulator_dtype: floating dtype of the stored sum, rounded to nearest. None: the parameter's, >= float32.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is ``optax.TraceState(trace)``, a tree of the parameters' structure and shapes.
        Errors are those of `adamite.scale_by_adam`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = trace(decay=0.5)
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.array([1.0, -2.0]), state)
        >>> print(updates)
        [ 1.75 -3.5 ]
    """
    rule = trace_rule(decay=checks.decay_rate("decay", decay), nesterov=checks.flag("nesterov", nesterov))
    dtype = checks.floating_dtype("accumulator_dtype", accumulator_dtype)
    return from_rule(rule, optax.TraceState, {"trace": Dense(dtype)}, moments)


def trace_or_identity(
    momentum: jax.typing.ArrayLike | None,
    nesterov: bool,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
) -> optax.GradientTransformation:
    """`trace`, or nothing where `momentum` is None; the other arguments are checked all the same."""
    if momentum is not None:
        return trace(checks.decay_rate("momentum", momentum), nesterov, accumulator_dtype, moments=moments)
    trace(0.0, nesterov, accumulator_dtype)
    choose(moments, {})
    return by_number(lambda u, *_: u, 0)


@described
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Gradient descent, with or without momentum: a drop-in for ``optax.sgd``.

    Args:
        learning_rate: finite and >= 0, the distance moved per unit of gradient; or a schedule.
        momentum: `trace`'s decay, in [0, 1). None: no momentum; the two that follow then change nothing.
        nesterov: see `trace`, as for the errors.
        accumulator_dtype: see `trace`.
        moments: see `adamite.scale_by_adam`.
        rounding: see `adamite.adam`.

    Returns:
        The optimizer. Its state is a tuple: that of `trace`, or ``optax.EmptyState`` without momentum, then that of
        `adamite.scale_by_learning_rate`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = sgd(0.05, momentum=0.9, nesterov=True), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        trace_or_identity(momentum, nesterov, accumulator_dtype, moments=moments),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )
