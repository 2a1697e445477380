"""An exponential moving average (EMA) of the weights, for evaluation.

After step t = 1, 2, ... with the weights w:

    rate <- max(1 - decay, 9 / (10 + t))            the warm-up; 1 - decay without one
    ema  <- ema + rate (w - ema)                    at first the initial weights

The second line is ``decay ema + (1 - decay) w``; written so, an average of weights at rest stays exactly where it is.
The first is ``decay_t = min(decay, (1 + t) / (10 + t))``, as in TensorFlow's ``tf.train.ExponentialMovingAverage`` with
``num_updates``. Averages of the iterates of stochastic approximation: Polyak & Juditsky 1992, doi:10.1137/0330046.

w are the full weights (`adamite.full_weights`): with residuals what the optimizer steps, else what is stored.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from adamite import checks
from adamite.accumulate import AccumulateState
from adamite.core import Rule, from_rule, full_weights
from adamite.core.optimizer import Optimizer, as_optimizer, moved, optimizer
from adamite.core.placement import settle
from adamite.guards import SkipState
from adamite.identity import described
from adamite.numerics import as_array, cast, is_none, unfused, widen
from adamite.paths import leaves_with_path, map_with_path
from adamite.rounding import as_stored
from adamite.storage import Dense

SEED = 0x454D41
"""Of the random bits: another one than that of moments and weights, whose roundings are then independent."""

STORAGES = {"float32": Dense(), "bfloat16": Dense(jnp.dtype(jnp.bfloat16), seed=SEED)}


class EmaState(NamedTuple):
    """State of `with_ema`."""

    count: Any  # int32, shape (): steps so far
    ema: Any  # the average; tree of the parameters' shapes, at least float32 or bfloat16; None for leaves without one
    inner: Any  # the state of the optimizer


class Average(NamedTuple):
    """The part of it that the engine steps."""

    count: Any  # int32, shape ()
    ema: Any  # as in EmaState


SKIPPING = (SkipState, AccumulateState, optax.MultiStepsState, optax.ApplyIfFiniteState, optax.ConditionallyMaskState)
"""States of transformations that skip steps, or parts of them."""


@described
def with_ema(
    tx: optax.GradientTransformation,
    decay: optax.ScalarOrSchedule = 0.9999,
    *,
    warmup: bool = True,
    storage: str = "float32",
) -> Optimizer:
    """Keep an exponential moving average of the weights in the optimizer's state; `ema_params` gives it.

    The updates are those of `tx`. The average is of the full weights after each step, those without a gradient, too.
    Leaves of the parameters that are no floating or complex arrays have no average.

    Nothing may change the updates after `with_ema`: it is the whole optimizer. What skips steps goes around it:
    ``accumulate(skip_nonfinite(with_ema(tx)), every=8)``. A skipped step then changes no bit of the average.

    Args:
        tx: any gradient transformation: the whole optimizer, without what skips steps.
        decay: in [0, 1): the share of the old average that is kept at each step; 0.999 averages about the last 1,000
            steps. Or a schedule: a function from the number of steps so far (int32, shape ()) to the decay.
        warmup: at step t = 1, 2, ... the decay is min(decay, (1 + t) / (10 + t)), so that the initial weights are soon
            forgotten. It reaches 0.999 at step 8,990 and 0.9999 at step 89,990.
        storage: "float32": 4 bytes for each weight; float64 and complex weights keep their dtype. "bfloat16": 2 bytes,
            rounded stochastically; complex weights are refused.

    Returns:
        The transformation; its update needs `params`. Its state is an `EmaState`.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing.
        ValueError: an argument is out of its range; at init, `tx` skips steps; at update, there are no `params`, or
            trees differ in structure or shape.

    Example:
        >>> from adamite import sgd
        >>> tx, params = with_ema(sgd(1.0), decay=0.5, warmup=False), jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.full(1, -8.0), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params, ema_params(state))
        [8.] [4.]
        [16.] [10.]
        [24.] [17.]
    """
    inner = as_optimizer(checks.transformation("tx", tx))
    share: Any = checks.decay_rate_or_schedule("decay", decay)
    warmup = checks.flag("warmup", warmup)
    kept = STORAGES[checks.one_of("storage", storage, tuple(STORAGES))]

    def scalars(t: jax.Array) -> tuple[Any]:
        at: Any = share(t - 1) if callable(share) else share
        return (jnp.maximum(1 - at, 9 / (10 + t.astype(jnp.float32))) if warmup else 1 - at,)

    def step(scalars: tuple[Any], w: jax.Array, ema: jax.Array) -> tuple[jax.Array, jax.Array]:
        (rate,) = scalars
        return w, ema + unfused(rate * (w - ema))

    def begin(scalars: tuple[()], w: jax.Array, ema: jax.Array) -> tuple[jax.Array, jax.Array]:
        del scalars, ema
        return w, jnp.copy(w)  # both may be donated

    first = from_rule(Rule(lambda _: (), begin), Average, {"ema": dataclasses.replace(kept, seed=None)})
    average = from_rule(Rule(scalars, step), Average, {"ema": kept})

    def init(params: optax.Params) -> EmaState:
        state = inner.init(params)
        for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SKIPPING)):
            if isinstance(node, SKIPPING):
                raise ValueError(
                    f"tx must not skip steps, got one with a {type(node).__name__}, whose skipped steps would count: "
                    "put with_ema inside, as in skip_nonfinite(with_ema(tx)) or accumulate(with_ema(tx), every)"
                )
        weights = jax.tree.map(lambda p: as_array(p) if checks.is_differentiable(p) else None, params)
        new: Any = first.update(jax.tree.map(widen, weights), first.init(weights))[1]
        return settle(EmaState(jnp.zeros_like(new.count), new.ema, state), params)

    def check(state: Any, params: Any) -> None:
        if not isinstance(state, EmaState):
            raise TypeError(f"state must be an EmaState, got {type(state).__name__}")
        if params is None:
            raise ValueError("with_ema averages params, got None: call update(updates, state, params)")

    def averaged(state: EmaState, after: Any, params: Any) -> EmaState:
        """The state after a step that led to `params` and to the state `after` of `tx`."""
        weights = jax.tree.map(lambda p: as_array(p) if checks.is_differentiable(p) else None, params)
        new: Any = average.update(full_weights(weights, after), Average(state.count, state.ema))[1]
        return EmaState(new.count, new.ema, after)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, EmaState]:
        check(state, params)
        new, after = inner.update(updates, state.inner, params, **extra_args)
        return new, averaged(state, after, _moved(params, new))

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, EmaState]:
        check(state, params)
        params, after = inner.step(grads, state.inner, params, engine=engine, **extra_args)
        return params, averaged(state, after, params)

    return optimizer(init, update, take)


def ema_params(state: optax.OptState, params: Any = None) -> Any:
    """The average of the weights that an optimizer with `with_ema` keeps: the weights to evaluate with.

    Args:
        state: the optimizer's state; the `EmaState` may be anywhere inside, as in guards, chains and `optax.partition`.
            Of two that are one inside of the other, the outer is used.
        params: tree of the weights, or None. With it the average has the weights' dtypes, rounded to the nearest; and
            where a leaf has no average, its own value stands.

    Returns:
        Tree of the structure of `params`. Without `params` its arrays are at least float32, and None where there is no
        average.

    Raises:
        ValueError: there is no average in `state`; averages of several groups of parameters need `params`; the average
            is of other parameters than `params`.

    Example:
        >>> from adamite import adam
        >>> tx, params = with_ema(adam(0.1), 0.999), {"w": jnp.ones(2, jnp.bfloat16)}
        >>> updates, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init(params), params)
        >>> print(ema_params(state)["w"].dtype, ema_params(state, params)["w"].dtype)
        float32 bfloat16
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, EmaState))
    found = [node.ema for node in nodes if isinstance(node, EmaState)]
    if not found:
        raise ValueError(f"state must hold an EmaState, as that of with_ema(tx) does, got {type(state).__name__}")
    if params is None:
        if len(found) > 1:
            raise ValueError(
                f"state holds {len(found)} averages, of parts of the parameters: call ema_params(state, params)"
            )
        return jax.tree.map(widen, found[0])
    averages = {path: leaf for ema in found for path, leaf in leaves_with_path(ema)}
    leaves = dict(leaves_with_path(params))
    for path, ema in averages.items():
        if path not in leaves:
            raise ValueError(f"params must be those that were averaged, got none at params{keystr(path)}")
        if ema.shape != jnp.shape(leaves[path]):
            raise ValueError(
                f"params{keystr(path)} has shape {jnp.shape(leaves[path])}, but its average has {ema.shape}"
            )

    def one(path: KeyPath, param: Any) -> Any:
        ema = averages.get(path)
        return param if ema is None else cast(ema, getattr(param, "dtype", ema.dtype))

    return map_with_path(one, params)


def _moved(params: Any, updates: optax.Updates) -> optax.Params:
    """The weights that `optax.apply_updates` will store; a weight without an update stays."""
    return jax.tree.map(lambda u, p: p if u is None else moved(p, as_stored(u)), updates, params, is_leaf=is_none)
