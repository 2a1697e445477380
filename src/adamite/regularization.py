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
from adamite.engine import uphold
from adamite.engine.matching import counterparts
from adamite.numerics import is_none, widen


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Any = None, *, after_learning_rate: bool = False
) -> optax.GradientTransformationExtraArgs:
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
    if checks.flag("after_learning_rate", after_learning_rate):
        decay = _negative(decay)
    return _needs_params(optax.add_decayed_weights(decay), mask)


def add_l1(strength: optax.ScalarOrSchedule = 0.0, mask: Any = None) -> optax.GradientTransformationExtraArgs:
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
    return _per_weight(lambda u, p, s: u + s * jnp.sign(p), "strength", strength, mask)


def soft_threshold(threshold: optax.ScalarOrSchedule = 0.0, mask: Any = None) -> optax.GradientTransformationExtraArgs:
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

    return _per_weight(shrink, "threshold", threshold, mask)


def _negative(value: Any) -> Any:
    schedule: Callable[[Any], Any] = value
    return (lambda count: -schedule(count)) if callable(value) else -value


def _needs_params(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformationExtraArgs:
    """`tx` where `mask` says, under the contract. It sees the parameters, which must be given, in at least float32."""
    inner = optax.with_extra_args_support(tx if checks.mask(mask) is None else optax.masked(tx, mask))

    def init(params: optax.Params) -> optax.OptState:
        _covered(mask, params)
        return inner.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weights cannot be regularized without params: call update(updates, state, params)")
        counterparts(updates, params, "params")
        _covered(mask, params)
        return inner.update(updates, state, jax.tree.map(widen, params), **extra_args)

    return uphold(optax.GradientTransformationExtraArgs(init, update))


def _covered(mask: Any, params: optax.Params) -> None:
    """Refuse a mask that does not fit. A tree without leaves is `optax.tree_map_params` asking for a state's form."""
    if mask is None or callable(mask) or not jax.tree.leaves(params):
        return
    try:
        jax.tree.map(lambda *_: None, mask, params)
    except ValueError:
        raise ValueError(
            f"mask must have the structure of params or a prefix of it, got {jax.tree.structure(mask)!s:.200} "
            f"for {jax.tree.structure(params)!s:.200}"
        ) from None


def _per_weight(
    change: Callable[[jax.Array, jax.Array, Any], jax.Array], name: str, value: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation ``u <- change(u, p, s)``, where s is `value`, or what that schedule says."""
    value = checks.non_negative_or_schedule(name, value)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)) if callable(value) else optax.EmptyState()

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[Any, Any]:
        s = value(state.count) if callable(value) else value
        new = jax.tree.map(lambda u, p: None if u is None else change(u, p, s), updates, params, is_leaf=is_none)
        return new, state._replace(count=optax.safe_increment(state.count)) if callable(value) else state

    return _needs_params(optax.GradientTransformation(init, update), mask)
