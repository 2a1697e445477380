"""Gradient accumulation: one step for several micro-batches, equal to that of one large batch.

    sum <- sum + g, n <- n + 1                       for each micro-batch whose gradients are finite
    u   <- update(sum / n), sum, n <- 0              with every so-manieth micro-batch; else u = 0

The mean of the means of equal micro-batches is the mean of all. A micro-batch that holds a NaN or an infinity is
dropped and counted. The sum starts anew by selection, not by a product, as ``0 * inf`` is NaN: where n is 0, what is
stored as the sum is not read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.core.matching import counterparts
from adamite.core.optimizer import Optimizer, as_optimizer, optimizer
from adamite.core.placement import beside, settle
from adamite.core.skipping import all_finite, no_updates, params_if, step_if, traced_once
from adamite.identity import described
from adamite.numerics import as_array, cast, is_none, wide_dtype, widen


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    count: Any  # int32, shape (): micro-batches since the last step was due, in [0, every)
    summed: Any  # int32, shape (): how many of them are in the sum, n
    dropped: Any  # int32, shape (): micro-batches dropped so far
    gradients: Any  # tree of the parameters' shapes: the sum; of no meaning where summed is 0
    inner: Any  # the state of the optimizer


@described
def accumulate(
    tx: optax.GradientTransformation,
    every: int,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Take a step with the mean gradient of every so many calls; the others change no parameter.

    A micro-batch with a NaN or an infinity in a gradient is dropped: the mean is of the others, and where there are
    none no step is taken. What a guard inside leaves out, ``accumulate(skip_nonfinite(tx), every)``, is the whole step.
    A guard around it would see each micro-batch, and could leave out the step again and again.

    Args:
        tx: any gradient transformation: the whole optimizer. Clipping inside of it is that of the mean.
        every: a whole number >= 1: how many micro-batches, all of one size, a step has.
        dtype: floating dtype of the sum. None: the parameters', at least float32. In bfloat16 it takes half the memory,
            and small gradients are lost beside a large sum.
        axis_name: see `adamite.skip_nonfinite`: devices drop as one.

    Returns:
        The transformation. Its state is an `AccumulateState`. `tx` sees the mean in at least float32; the updates
        have the dtypes that it gives them then.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing.
        ValueError: an argument is out of its range; at update, trees differ in structure or shape.

    Example:
        >>> from adamite import sgd
        >>> tx, params = accumulate(sgd(1.0), every=2), jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for g in (1.0, 3.0, 5.0, jnp.nan):
        ...     updates, state = tx.update(jnp.full(1, g), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params, state.dropped)
        [0.] 0
        [-2.] 0
        [-2.] 0
        [-7.] 1
    """
    inner = as_optimizer(checks.transformation("tx", tx))
    every, kept_in = checks.whole("every", every, lowest=1), checks.floating_dtype("dtype", dtype)
    axes = checks.axis_name(axis_name)

    def fresh(param: Any) -> jax.Array:
        leaf = param if isinstance(param, jax.ShapeDtypeStruct) else as_array(param)
        wide = wide_dtype(leaf.dtype)
        real = jnp.issubdtype(wide, jnp.floating)
        return beside(leaf, jnp.zeros_like(leaf, kept_in if kept_in and real else wide))

    def init(params: optax.Params) -> AccumulateState:
        checks.differentiable(params, "params")
        count, summed, dropped = (jnp.zeros((), jnp.int32) for _ in range(3))
        gradients = jax.tree.map(fresh, params)
        return settle(AccumulateState(count, summed, dropped, gradients, inner.init(params)), params)

    def added(updates: optax.Updates, state: Any) -> tuple[jax.Array, Any, AccumulateState]:
        """Whether a step is to be taken, the sum, which is then the mean, and the state, but for the inner one.

        One array for each leaf is the sum that is stored or the mean, so that nothing is written to memory twice. The
        sum starts anew by selection: what is stored after a step is the mean of that step.
        """
        if not isinstance(state, AccumulateState):
            raise TypeError(f"state must be an AccumulateState, got {type(state).__name__}")
        checks.differentiable(updates, "updates")
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        before = counterparts(updates, state.gradients, "gradients")
        good = all_finite([[as_array(g)] for g in leaves if g is not None], axes)
        summed, due = state.summed + good, state.count + 1 >= every
        wanted = due & (summed > 0)
        divisor = jnp.where(wanted, summed, 1)

        def one(g: Any, s: Any) -> jax.Array:
            so_far = jnp.where(state.summed > 0, widen(s), 0)
            return jnp.where(good, so_far + widen(g), so_far) / divisor

        sums = [None if g is None else one(g, s) for g, s in zip(leaves, before, strict=True)]
        stored = [s if x is None else cast(x, s.dtype) for x, s in zip(sums, before, strict=True)]
        dropped = jnp.where(good, state.dropped, optax.safe_increment(state.dropped))
        count, left = jnp.where(due, 0, state.count + 1), jnp.where(due, 0, summed)
        after = AccumulateState(count, left, dropped, structure.unflatten(stored), state.inner)
        return wanted, structure.unflatten(sums), after

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccumulateState]:
        wanted, mean, after = added(updates, state)
        do = traced_once(
            functools.partial(inner.update, mean, state.inner, params, **extra_args), updates, state, params
        )
        like = jax.eval_shape(do)[0]
        new, kept = step_if(wanted, do, lambda: (no_updates(updates, like), state.inner))
        return new, after._replace(inner=kept)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, AccumulateState]:
        wanted, mean, after = added(grads, state)
        do = functools.partial(inner.step, mean, state.inner, params, engine=engine, **extra_args)
        new, kept = params_if(wanted, do, lambda: (params, state.inner), grads, params)
        return new, after._replace(inner=kept)

    return optimizer(init, update, take)
