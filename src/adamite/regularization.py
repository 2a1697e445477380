"""Regularization as parts to chain.

What each does to Adam depends on where it stands:

    add_decayed_weights, before Adam            L2:  g <- g + s p; Adam divides it by sqrt(v) with the rest of g
    add_decayed_weights, after Adam             decoupled decay (AdamW):  u <- u + s p; every weight shrinks by s lr
    ... after_learning_rate=True, at the end    decoupled from the learning rate, too:  u <- u - s p; shrinks by s
    add_l1, before Adam                         L1 in the loss:  g <- g + s sign(p); small weights jitter around 0
    soft_threshold, at the end                  proximal L1:  p + u moves s towards 0, and small weights are exactly 0

Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2 (decoupled decay). Parikh & Boyd 2014, Proximal Algorithms,
section 6.5.2 (soft thresholding).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core import Optimizer, by_number
from adamite.identity import described


@described
def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Any = None, *, after_learning_rate: bool = False
) -> Optimizer:
    """Add ``weight_decay`` times the parameters to the updates: optax's, in float32, its arguments checked.

    Args:
        weight_decay: a finite number >= 0, an array of shape (), or a schedule.
        mask: which leaves decay: a tree of booleans with the structure of the parameters (or a prefix of it), or a
            function from the parameters to one. None: all.
        after_learning_rate: subtract instead: for the end of a chain, where updates have been scaled and negated. The
            decay is then a fraction per step, whatever the learning rate.

    Returns:
        The transformation. Its update needs `params`.

    Raises:
        ValueError: `weight_decay` is negative or not finite; at update, `params` is missing or differs in a shape.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> tx = add_decayed_weights(0.1, mask={"w": True, "b": False})
        >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
        >>> updates, _ = tx.update({"w": jnp.zeros(2), "b": jnp.zeros(2)}, tx.init(params), params)
        >>> print(updates["w"], updates["b"])
        [0.1 0.1] [0. 0.]
    """
    decay = checks.non_negative_or_schedule("weight_decay", weight_decay)
    sign = -1 if checks.flag("after_learning_rate", after_learning_rate) else 1
    none = isinstance(decay, float) and decay == 0  # optax's shortcut; 0 times an infinite weight would be NaN
    counted = type(jax.eval_shape(optax.add_decayed_weights(decay).init, ()))
    return _per_weight(lambda u, p, s: u if none else u + s * p, decay, mask, sign, counted)


@described
def add_l1(strength: optax.ScalarOrSchedule = 0.0, mask: Any = None) -> Optimizer:
    """Add ``strength`` times the sign of the parameters, the subgradient of ``strength |p|``, to the updates.

    Args:
        strength: a finite number >= 0, an array of shape (), or a schedule.
        mask: see `add_decayed_weights`.

    Returns:
        The transformation. Its update needs `params`.

    Raises:
        ValueError: as `add_decayed_weights`.
        TypeError: as `add_decayed_weights`.

    Example:
        >>> tx, params = add_l1(0.1), jnp.array([2.0, -3.0, 0.0])
        >>> print(tx.update(jnp.zeros(3), tx.init(params), params)[0])
        [ 0.1 -0.1  0. ]
    """
    strength = checks.non_negative_or_schedule("strength", strength)
    return _per_weight(lambda u, p, s: u + s * jnp.sign(p), strength, mask)


@described
def soft_threshold(threshold: optax.ScalarOrSchedule = 0.0, mask: Any = None) -> Optimizer:
    """Move where the updates lead by ``threshold`` towards 0, and to exactly 0 what is nearer: proximal L1.

    For the end of a chain: ``optax.apply_updates`` then lands on ``sign(p + u) max(|p + u| - threshold, 0)``. For the
    penalty ``strength |p|`` the threshold is ``strength * learning_rate``.

    Args:
        threshold: in the weights' unit, per step: a finite number >= 0, an array of shape (), or a schedule.
        mask: see `add_decayed_weights`.

    Returns:
        The transformation. Its update needs `params`.

    Raises:
        ValueError: as `add_decayed_weights`.
        TypeError: as `add_decayed_weights`.

    Example:
        >>> tx, params = soft_threshold(0.5), jnp.array([2.0, -0.3])
        >>> print(params + tx.update(jnp.array([-1.0, 0.1]), tx.init(params), params)[0])
        [0.5 0. ]
    """

    def shrink(u: jax.Array, p: jax.Array, s: Any) -> jax.Array:
        aim = p + u
        return jnp.sign(aim) * jnp.maximum(jnp.abs(aim) - s, 0) - p

    return _per_weight(shrink, checks.non_negative_or_schedule("threshold", threshold), mask)


def _per_weight(
    change: Callable[[jax.Array, jax.Array, Any], jax.Array],
    value: optax.ScalarOrSchedule,
    mask: Any,
    sign: int = 1,
    counted: type[Any] = optax.ScaleByScheduleState,
) -> Optimizer:
    needs = "weights cannot be regularized without params"
    return by_number(change, value, sign=sign, counted=counted, mask=checks.mask(mask), needs_params=needs)
