"""What every transformation of ours keeps to, whatever it is made of.

1. Arithmetic is at least float32. A decay of 1e-4 added to an update near 1 is lost in bfloat16, which has eight bits.
2. Updates come back in the gradients' dtypes, rounded once, at the end; or, where `round_weights` stands there, not at
   all: it has rounded the weights.
3. Step counts live where the parameters live (see `placement.settle`).
4. `params` may be left out where nothing needs them, and unknown extra arguments are passed on or ignored.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from adamite import checks
from adamite.engine.leafwise import Leafwise, Pass, leafwise
from adamite.engine.optimizer import Optimizer, optimizer
from adamite.engine.parts import Part, compose
from adamite.engine.placement import settle
from adamite.engine.weights import round_weights
from adamite.identity import described
from adamite.numerics import as_array, cast, widen

Stage = Callable[[optax.Updates, tuple[Any, ...], optax.Params | None, dict[str, Any]], tuple[optax.Updates, Any]]


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
        return _in_dtypes_of(updates, new), state

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
    kinds = [tx.part if isinstance(tx, Leafwise) else None for tx in parts]
    if any(part and part.weights for part in kinds[:-1]):
        raise ValueError("round_weights must be the last part of a chain: what follows would move the weights again")
    if None not in kinds:
        return leafwise(compose([part for part in kinds if part]))

    stages: list[tuple[int, Stage]] = []
    for one_pass, group in itertools.groupby(zip(parts, kinds, strict=True), key=lambda pair: pair[1] is not None):
        txs, its_parts = zip(*group, strict=True)
        stages.append((len(txs), _in_one_pass(its_parts) if one_pass else _one_by_one(txs)))
    rounds_weights = kinds[-1] is not None and kinds[-1].weights is not None
    last = (
        None if kinds[-1] is None else Pass(compose([part for part in kinds[sum(n for n, _ in stages[:-1]) :] if part]))
    )

    def init(params: optax.Params) -> Any:
        return settle(tuple(tx.init(params) for tx in parts), params)

    def through(stages: Any, updates: Any, states: Any, params: Any, extra_args: Any) -> tuple[Any, Any, Any]:
        """The updates behind so many stages, their new states, and the states of the rest."""
        done = ()
        for length, run in stages:
            updates, new = run(updates, states[:length], params, extra_args)
            states, done = states[length:], (*done, *new)
        return updates, done, states

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        checks.differentiable(updates, "updates")
        new, done, _ = through(stages, updates, checks.states(state, len(parts)), params, extra_args)
        return new if rounds_weights else _in_dtypes_of(updates, new), done

    ending = [part for part in kinds[len(parts) - stages[-1][0] :] if part]
    if not ending:
        return optimizer(init, update)
    last = Pass(compose(ending))

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, Any]:
        """As `update`, but for the last pass, which ends with the weights."""
        checks.differentiable(grads, "updates")
        states = checks.states(state, len(parts))
        updates, done, rest = through(stages[:-1], grads, states, params, extra_args)
        params, new = last.step(_wide(updates), rest, params, engine, like=grads)
        return params, (*done, *new)

    return optimizer(init, update, take)


def _in_one_pass(parts: Sequence[Part]) -> Stage:
    run = Pass(compose(parts), rounded=False).update
    return lambda updates, states, params, _: run(updates, states, params)


def _one_by_one(txs: Sequence[optax.GradientTransformation]) -> Stage:
    run = optax.chain(*txs).update
    return lambda updates, states, params, extra_args: run(_wide(updates), states, params, **extra_args)


def _wide(updates: optax.Updates) -> optax.Updates:
    return jax.tree.map(widen, updates)


def _in_dtypes_of(gradients: optax.Updates, updates: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda u, g: cast(u, as_array(g).dtype), updates, gradients)
