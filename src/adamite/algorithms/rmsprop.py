"""RMSProp: each coordinate steps by its gradient over its root mean square gradient, or over its standard deviation.

At step t = 1, 2, ... with gradient g:

    c <- 1 - decay^t                                with bias_correction, else 1
    m <- (1 - decay) g + decay m                    centred only
    v <- (1 - decay) g^2 + decay v                  for complex g: |g|^2
    s  = v / c                                      centred: max(v / c - |m / c|^2, 0)
    u  = g / sqrt(s + eps)                          with eps_in_sqrt, else g / (sqrt(s) + eps)

The parameters then move by -learning_rate u; with momentum, by `trace` of that. m and v are the state's ``mu`` and
``nu``; v starts at ``initial_scale``.

Tieleman & Hinton 2012, Neural Networks for Machine Learning, lecture 6.5,
www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf. Centred, with momentum: Graves 2013, arXiv:1308.0850,
equations 38 to 41 (decay 0.95, eps 1e-4, momentum 0.9).

Deviations, the first two optax's too:

1. The lecture has no eps, and neither source a bias correction. torch is ``eps_in_sqrt=False``.
2. Momentum adds up steps already scaled by the learning rate, as Graves does; torch scales their sum.
3. A variance that rounding has made negative is 0; optax takes its root, which is NaN. With a bias correction that is
   the first step: there the variance is 0 but for rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.algorithms.sgd import trace_or_identity
from adamite.core import Optimizer, Rule, chain, from_rule
from adamite.identity import described
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import abs_sq, power, update_moment
from adamite.storage import Dense


def rms_rule(
    *, decay: jax.typing.ArrayLike, eps: jax.typing.ArrayLike, eps_in_sqrt: bool, bias_correction: bool
) -> Rule:
    """The equations above, not centred."""

    def step(scalars: tuple[Any], g: Any, v: Any) -> tuple[Any, Any]:
        (c,) = scalars
        v = update_moment(g, v, decay, order=2)
        s = v / c
        u = _inverse_root(s, eps, eps_in_sqrt) * g
        return u, v

    return Rule(_scalars(decay, bias_correction), step)


def stddev_rule(
    *, decay: jax.typing.ArrayLike, eps: jax.typing.ArrayLike, eps_in_sqrt: bool, bias_correction: bool
) -> Rule:
    """The equations above, centred."""

    def step(scalars: tuple[Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        (c,) = scalars
        m = update_moment(g, m, decay, order=1)
        v = update_moment(g, v, decay, order=2)
        s = jnp.maximum(v / c - abs_sq(m / c), 0)
        u = _inverse_root(s, eps, eps_in_sqrt) * g
        return u, m, v

    return Rule(_scalars(decay, bias_correction), step)


@described
def scale_by_rms(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """RMSProp's direction, not yet scaled by a learning rate nor negated.

    Args:
        decay: in [0, 1), per step: how much of the mean squared gradient (centred: and of the mean) is kept.
        eps: finite, >= 0: added to the root, in the gradient's unit, or inside it, in the squared gradient's.
        initial_scale: finite, >= 0, in the squared gradient's unit: what the mean squared gradient starts from.
        eps_in_sqrt: add eps inside the root. Of two eps of equal effect the one inside is the other's square.
        bias_correction: divide the means by 1 - decay^t. With ``eps_in_sqrt=False`` this is Adam's step for b1 = 0.
        moments: see `adamite.scale_by_adam`.

    Returns:
        The transformation. Its state is optax's ``ScaleByRmsState(nu)`` or, with a bias correction,
        ``ScaleByRmsWithCountState(count, nu)``; ``nu`` is a tree of the parameters' structure and shapes, real and at
        least float32. Errors are those of `adamite.scale_by_adam`.

    Example:
        The mean starts from 0, so that the first direction is the sign over sqrt(1 - decay):

        >>> tx = scale_by_rms(decay=0.75)
        >>> direction, state = tx.update(jnp.array([0.1, -20.0]), tx.init(jnp.zeros(2)))
        >>> print(direction.round(3))
        [ 2. -2.]
    """
    initial = checks.non_negative("initial_scale", initial_scale)
    options = _checked(decay, eps, eps_in_sqrt, bias_correction)
    like = optax.scale_by_rms(bias_correction=options["bias_correction"])
    return from_rule(rms_rule(**options), _state_class(like), {"nu": Dense(unsigned=True, initial=initial)}, moments)


@described
def scale_by_stddev(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    moments: Any = "float32",
) -> Optimizer:
    """Centred RMSProp's direction: `scale_by_rms` with the standard deviation. Arguments and errors are its own.

    The state, optax's ``ScaleByRStdDevState`` or ``ScaleByRStdDevWithCountState``, also has the mean gradient ``mu``.

    Example:
        A gradient whose sign flips has mean 0; one that is constant has variance 0 in the end, and its step grows:

        >>> tx = scale_by_stddev(decay=0.5)
        >>> state = tx.init(jnp.zeros(2))
        >>> for sign in (1.0, -1.0) * 4:
        ...     direction, state = tx.update(jnp.array([sign, 1.0]), state)
        >>> print(direction.round(1))
        [-1.1 16. ]
    """
    initial = checks.non_negative("initial_scale", initial_scale)
    options = _checked(decay, eps, eps_in_sqrt, bias_correction)
    like = optax.scale_by_stddev(bias_correction=options["bias_correction"])
    means = {"mu": Dense(), "nu": Dense(unsigned=True, initial=initial)}
    return from_rule(stddev_rule(**options), _state_class(like), means, moments)


@described
def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """RMSProp: a drop-in for ``optax.rmsprop``.

    `learning_rate` is `adamite.adam`'s; `momentum` (None: none) and `nesterov` are `adamite.sgd`'s; ``centered`` takes
    `scale_by_stddev`; the other arguments and the errors are those of `scale_by_rms`. The state is a tuple: that of
    either, of `adamite.scale_by_learning_rate`, and of `adamite.trace` or ``optax.EmptyState``.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = rmsprop(optax.linear_schedule(0.1, 0.0, 200), momentum=0.5), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    scale = scale_by_stddev if checks.flag("centered", centered) else scale_by_rms
    return chain(
        scale(decay, eps, initial_scale, eps_in_sqrt, bias_correction, moments=moments),
        scale_by_learning_rate(learning_rate),
        trace_or_identity(momentum, nesterov, moments=moments),
        rounding=rounding,
    )


def _scalars(decay: jax.typing.ArrayLike, bias_correction: bool) -> Any:
    return (lambda t: (1 - power(decay, t),)) if bias_correction else (lambda: (1,))


def _inverse_root(s: jax.Array, eps: jax.typing.ArrayLike, eps_in_sqrt: bool) -> jax.Array:
    return jax.lax.rsqrt(s + eps) if eps_in_sqrt else 1 / (jnp.sqrt(s) + eps)


def _checked(decay: Any, eps: Any, eps_in_sqrt: Any, bias_correction: Any) -> dict[str, Any]:
    return {
        "decay": checks.decay_rate("decay", decay),
        "eps": checks.non_negative("eps", eps),
        "eps_in_sqrt": checks.flag("eps_in_sqrt", eps_in_sqrt),
        "bias_correction": checks.flag("bias_correction", bias_correction),
    }


def _state_class(tx: optax.GradientTransformation) -> type[Any]:
    """The class of optax's state, of which two of four have no public name. Nothing is computed."""
    return type(jax.eval_shape(tx.init, ()))
