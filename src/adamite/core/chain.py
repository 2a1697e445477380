"""What every transformation of ours keeps to, whatever it is made of.

1. Arithmetic is at least float32. A decay of 1e-4 added to an update near 1 is lost in bfloat16, which has eight bits.
2. An update is rounded once, at the end, to the wider of the gradient's and the weight's dtype: it holds all that the
   weight can (`numerics.update_dtype`). Where `round_weights` stands at the end, the update is not rounded at all.
3. Where `round_weights` stands at the end, the parts before it see the full weights, residuals included, in float32.
4. Step counts live where the parameters live (see `placement.settle`).
5. `params` may be left out where nothing needs them, and unknown extra arguments are passed on or ignored.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adamite import checks, engines
from adamite.core.optimizer import Optimizer, optimizer
from adamite.core.part import compose
from adamite.core.placement import settle
from adamite.core.rounding_part import full_weights, round_weights, rounds_weights
from adamite.core.tree_pass import Leafwise, TreePass, leafwise
from adamite.identity import described
from adamite.numerics import cast, is_none, update_dtype, wide_dtype, widen


def uphold(tx: optax.GradientTransformation) -> Optimizer:
    """`tx` under this file's contract. The state is that of `tx`, unchanged."""
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return settle(inner.init(params), params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        checks.differentiable(updates, "updates")
        new, state = inner.update(_wide(updates), state, params, **extra_args)
        return _rounded(new, updates, params), state

    return optimizer(init, update)


@described
def chain(*parts: optax.GradientTransformation, rounding: Any = None) -> Optimizer:
    """`optax.chain`, with float32 between the parts and one rounding at the end; in one pass where parts allow it.

    The state is `optax.chain`'s, a tuple of the parts' states. For float32 gradients the numbers are, too; for bfloat16
    and float16 gradients no part's result is rounded before the next part has seen it.

    Args:
        *parts: transformations of adamite or of optax, applied first to last; at least one.
        rounding: how weights of 16 bits take their updates: `round_weights` of it is added as the last part. None: as
            optax's do, the update is rounded, then the sum.

    Raises:
        ValueError: `round_weights` is not the last of them; there are none.
        TypeError: a part is no transformation; at update, the state is not a tuple of as many states.

    Example:
        Gradients clipped to norm 1, then Adam:

        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> tx = chain(optax.clip_by_global_norm(1.0), adam(0.1))
        >>> params = jnp.ones(2)
        >>> updates, state = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
        >>> print(updates.round(3))
        [-0.1 -0.1]
    """
    if rounding is not None:
        parts = (*parts, round_weights(rounding))
    if not parts:
        raise ValueError("chain needs at least one transformation, got none")
    for number, tx in enumerate(parts):
        checks.transformation(f"parts[{number}]", tx)
    for number, tx in enumerate(parts[:-1]):
        if rounds_weights(tx):
            raise ValueError(
                f"parts[{number}] rounds weights, and parts[{number + 1}] would move them again: "
                "round_weights must be the last part of a chain, as chain(..., rounding=...) has it"
            )
    leaf_parts = [tx.part for tx in parts if isinstance(tx, Leafwise) and tx.part]
    return leafwise(compose(leaf_parts)) if len(leaf_parts) == len(parts) else _in_stages(parts)


class Stage(NamedTuple):
    """Neighbours in a chain that run together."""

    txs: Sequence[optax.GradientTransformation]
    run: Callable[..., tuple[optax.Updates, Any]]
    """``run(updates, states, params, extra_args) -> (updates, states)``"""
    one_pass: TreePass | None
    """What runs them if they are parts; None: they are transformations of any kind, one after the other."""


def _in_stages(parts: Sequence[optax.GradientTransformation]) -> Optimizer:
    """The chain of transformations of which not all are parts."""
    *stages, last = [_stage(list(group)) for _, group in itertools.groupby(parts, lambda tx: isinstance(tx, Leafwise))]
    one_pass = last.one_pass
    rounds = one_pass is not None and one_pass.part.weights is not None

    def init(params: optax.Params) -> Any:
        return settle(tuple(_of_full_weights(tx, params) if rounds else tx.init(params) for tx in parts), params)

    def through(updates: Any, states: Any, params: Any, extra_args: Any) -> tuple[Any, Any, Any]:
        """The updates behind all stages but the last, their new states, and the last one's states."""
        seen, done = full_weights(params, states[-1]) if rounds and params is not None else params, ()
        for stage in stages:
            updates, new = stage.run(updates, states[: len(stage.txs)], seen, extra_args)
            states, done = states[len(stage.txs) :], (*done, *new)
        return updates, done, states

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        checks.differentiable(updates, "updates")
        new, done, states = through(updates, checks.states(state, len(parts)), params, extra_args)
        new, states = last.run(new, states, params, extra_args)
        return new if rounds else _rounded(new, updates, params), (*done, *states)

    if one_pass is None:
        return optimizer(init, update)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, Any]:
        """As `update`, but the last pass ends with the weights."""
        checks.differentiable(grads, "updates")
        with engines.asking(engine):
            updates, done, states = through(grads, checks.states(state, len(parts)), params, extra_args)
        params, states = one_pass.step(_wide(updates), states, params, engine, like=_like(updates, grads, params))
        return params, (*done, *states)

    return optimizer(init, update, take)


def _stage(txs: Sequence[Any]) -> Stage:
    if not isinstance(txs[0], Leafwise):
        run = optax.chain(*txs).update
        return Stage(txs, lambda updates, states, params, extra: run(_wide(updates), states, params, **extra), None)
    one_pass = TreePass(compose([tx.part for tx in txs]), rounded=False)

    def by_engine(updates: Any, states: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        return one_pass.update(updates, states, params, extra.get("engine"))

    return Stage(txs, by_engine, one_pass)


def _of_full_weights(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """The first state of `tx` for the full weights. They are made only where the state depends on their dtypes."""

    def full(p: Any) -> Any:
        abstract = isinstance(p, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(p.shape, wide_dtype(p.dtype), sharding=p.sharding) if abstract else widen(p)

    if isinstance(tx, Leafwise):
        return tx.init(params)
    own, theirs = (jax.eval_shape(tx.init, x) for x in (params, jax.eval_shape(_wide, params)))
    return tx.init(params if jax.tree.leaves(own) == jax.tree.leaves(theirs) else jax.tree.map(full, params))


def _wide(updates: optax.Updates) -> optax.Updates:
    return jax.tree.map(widen, updates)


def _like(updates: Any, gradients: Any, params: Any) -> Any:
    """The gradients; or the weights, where the updates are of others than have gradients, as `optax.lookahead`'s."""
    same = jax.tree.structure(updates, is_leaf=is_none) == jax.tree.structure(gradients, is_leaf=is_none)
    return gradients if same or params is None else params


def _rounded(updates: optax.Updates, gradients: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Updates of at least float32 in the dtypes that they have outside."""
    like = _like(updates, gradients, params)
    if params is None:
        return jax.tree.map(lambda u, g: cast(u, update_dtype(g)), updates, like)

    def one(u: Any, g: Any, p: Any) -> Any:
        return None if u is None else cast(u, update_dtype(g, p))

    return jax.tree.map(one, updates, like, params, is_leaf=is_none)
