"""Adam: each coordinate steps by its mean gradient over its root mean square gradient.

At step t = 1, 2, ... with gradient g:

    c1, c2 = 1 - b1^t, 1 - b2^t
    m      <- (1 - b1) g + b1 m
    v      <- (1 - b2) g^2 + b2 v                   for complex g: |g|^2
    m_hat  = m / c1                                 with Nesterov: b1 (m / (1 - b1^(t+1))) + (1 - b1) (g / c1)
    u      = m_hat / (sqrt(v / c2 + eps_root) + eps)

The parameters then move by -learning_rate u. m and v are the state's ``mu`` and ``nu``, t is its ``count`` after the
step.

Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1. Nesterov: Dozat 2016, openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ,
Algorithm 2. Decoupled decay: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

Deviations from the papers, all of them optax's too:

1. eps_root, inside the root, is not in the paper; it is 0 unless asked for. It keeps derivatives through the step
   finite where v = 0.
2. Dozat multiplies v / (1 - b2^t) by b2, and varies b1 with t; here neither.
3. Weight decay is multiplied by the learning rate; the paper multiplies it by the schedule's factor alone.
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


def adam_rule(
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    nesterov: bool,
    bias_correction: bool,
) -> Rule:
    """The equations above."""

    def scalars(t: jax.Array) -> tuple[Any, Any, Any]:
        if not bias_correction:
            return 1, 1, 1
        return 1 - power(b1, t), 1 - power(b2, t), (1 - power(b1, optax.safe_increment(t))) if nesterov else 1

    def step(scalars: tuple[Any, Any, Any], g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
        c1, c2, c1_next = scalars
        m = update_moment(g, m, b1, order=1)
        v = update_moment(g, v, b2, order=2)
        m_hat = b1 * (m / c1_next) + (1 - b1) * (g / c1) if nesterov else m / c1
        u = m_hat / (jnp.sqrt(v / c2 + eps_root) + eps)
        return u, m, v

    return Rule(scalars, step)


@described
def scale_by_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    moments: Any = "float32",
) -> Optimizer:
    """Adam's direction, not yet scaled by a learning rate nor negated.

    Args:
        b1: in [0, 1), per step: how much of the mean gradient is kept.
        b2: in [0, 1), per step: how much of the mean squared gradient is kept. Its memory is 1 / (1 - b2) steps.
        eps: finite, >= 0, in the gradient's unit: added to the root, so that gradients much below it move little.
        eps_root: finite, >= 0, in the squared gradient's unit: added inside the root. Set it when you differentiate
            through the optimizer; 0 otherwise.
        mu_dtype: floating dtype in which ``mu`` is stored, rounded to nearest. None: the parameter's, at least float32.
        nesterov: use Nesterov's momentum (NAdam).
        bias_correction: divide the moments by 1 - b^t. BERT's Adam does not: its first steps are 3 to 7
            times larger.
        moments: how ``mu`` and ``nu`` are kept between steps: "float32" (8 bytes per parameter), "bfloat16" (4, rounded
            stochastically) or "int8" (2.03, in blocks of 256; leaves of fewer than 4,096 elements stay float32); a pair
            of these, for the mean and for the mean square, which may also be "float8"; a function from a leaf's path
            and the leaf to a name or a pair; or an object of `adamite.storage`. Arithmetic is float32 throughout.

    Returns:
        The transformation. Its state is ``optax.ScaleByAdamState(count, mu, nu)``: int32 of shape (), and two trees
        of the parameters' structure and shapes, at least float32; ``nu`` is real. With ``moments="int8"``, or a
        function, ``mu`` and ``nu`` are each an `adamite.Quantized` of two such trees.

    Raises:
        ValueError: an argument is out of its range; at update, trees differ in structure or shape (with the path).
        TypeError: an argument or a leaf is the wrong kind of thing; the state is another optimizer's.

    Example:
        After one step the direction is the gradient's sign, whatever its size:

        >>> tx = scale_by_adam()
        >>> g = jnp.array([1e-3, -20.0, 0.0])
        >>> direction, state = tx.update(g, tx.init(jnp.zeros(3)))
        >>> print(direction.round(3))
        [ 1. -1.  0.]
    """
    b1, b2 = checks.decay_rate("b1", b1), checks.decay_rate("b2", b2)
    eps, eps_root = checks.non_negative("eps", eps), checks.non_negative("eps_root", eps_root)
    nesterov, bias_correction = checks.flag("nesterov", nesterov), checks.flag("bias_correction", bias_correction)
    mu_dtype = checks.floating_dtype("mu_dtype", mu_dtype)

    rule = adam_rule(b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov, bias_correction=bias_correction)
    return from_rule(rule, optax.ScaleByAdamState, {"mu": Dense(mu_dtype), "nu": Dense(unsigned=True)}, moments)


@described
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Adam: a drop-in for ``optax.adam``.

    Args:
        learning_rate: finite and >= 0, about the distance that a weight moves in a step; or a schedule.
        b1: see `scale_by_adam`, as for the arguments that follow.
        b2: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        eps_root: see `scale_by_adam`.
        mu_dtype: see `scale_by_adam`.
        nesterov: see `scale_by_adam`.
        bias_correction: see `scale_by_adam`.
        moments: see `scale_by_adam`.
        rounding: how bfloat16 and float16 weights take their updates, see `adamite.round_weights`: "nearest",
            "stochastic", "residual8" or "residual16". None, as optax: round the update, then the sum.

    Returns:
        The optimizer. Its state is a tuple: that of `scale_by_adam`, then that of `scale_by_learning_rate`, then, if
        there is a rounding, that of `adamite.round_weights`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
        >>> tx, params = adam(0.1), jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params.round(2))
        [3. 3.]
    """
    return chain(
        scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, bias_correction=bias_correction, moments=moments
        ),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )


@described
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    bias_correction: bool = True,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """Adam with decoupled weight decay: a drop-in for ``optax.adamw``.

    Args:
        learning_rate: see `adam`.
        b1: see `scale_by_adam`, as for the arguments that follow.
        b2: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        eps_root: see `scale_by_adam`.
        mu_dtype: see `scale_by_adam`.
        weight_decay: finite and >= 0, or a schedule: each step takes ``learning_rate * weight_decay`` of a weight away.
        mask: which leaves decay, see `add_decayed_weights`. Biases and norms usually should not.
        nesterov: see `scale_by_adam`.
        bias_correction: see `scale_by_adam`.
        moments: see `scale_by_adam`.
        rounding: see `adam`.

    Returns:
        The optimizer; its update needs `params`. Its state is a tuple: that of `scale_by_adam`, of
        `add_decayed_weights` and of `scale_by_learning_rate`, and of `adamite.round_weights` if there is a rounding.

    Raises:
        ValueError: an argument is out of its range; at update, `params` is missing.
        TypeError: an argument is the wrong kind of thing.

    Example:
        With a zero gradient only the decay acts:

        >>> tx, params = adamw(0.1, weight_decay=0.5), jnp.array([2.0, -4.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        >>> print(updates)
        [-0.1  0.2]
    """
    return chain(
        scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, bias_correction=bias_correction, moments=moments
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        rounding=rounding,
    )


@described
def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    bias_correction: bool = True,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """`adam` with Nesterov's momentum: a drop-in for ``optax.nadam``. Arguments and errors are those of `adam`."""
    return adam(
        learning_rate, b1, b2, eps, eps_root, mu_dtype,
        nesterov=nesterov, bias_correction=bias_correction, moments=moments, rounding=rounding,
    )  # fmt: skip


@described
def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = True,
    bias_correction: bool = True,
    moments: Any = "float32",
    rounding: Any = None,
) -> Optimizer:
    """`adamw` with Nesterov's momentum: a drop-in for ``optax.nadamw``. Arguments and errors are those of `adamw`."""
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask,
        nesterov=nesterov, bias_correction=bias_correction, moments=moments, rounding=rounding,
    )  # fmt: skip
