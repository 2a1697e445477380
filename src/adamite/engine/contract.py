"""What every transformation of ours keeps to, whatever it is made of.

1. Arithmetic is at least float32. A decay of 1e-4 added to an update near 1 is lost in bfloat16, which has eight bits.
2. Updates come back in the gradients' dtypes, rounded once, at the end.
3. Step counts live where the parameters live (see `placement.settle`).
4. `params` may be left out where nothing needs them, and unknown extra arguments are passed on or ignored.
"""

from typing import Any

import jax
import optax

from adamite import checks
from adamite.engine.placement import settle
from adamite.numerics import as_array, cast, widen


def uphold(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` under this file's contract. The state is that of `tx`, unchanged."""
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return settle(inner.init(params), params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        checks.differentiable(updates, "updates")
        gradients = jax.tree.map(as_array, updates)
        new, state = inner.update(jax.tree.map(widen, gradients), state, params, **extra_args)
        return jax.tree.map(lambda u, g: cast(u, g.dtype), new, gradients), state

    return optax.GradientTransformationExtraArgs(init, update)


def chain(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, with float32 between the parts and one rounding at the end.

    The state is `optax.chain`'s, a tuple of the parts' states. For float32 gradients the numbers are, too; for bfloat16
    and float16 gradients no part's result is rounded before the next part has seen it.

    Args:
        *parts: transformations of adamite or of optax, applied first to last; at least one.

    Raises:
        TypeError: at update, the state is not a tuple of as many states.

    Example:
        Gradients clipped to norm 1, then Adam:

        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> tx = chain(optax.clip_by_global_norm(1.0), adam(0.1))
        >>> params = jnp.ones(2)
        >>> updates, state = tx.update(jnp.array([30.0, 40.0]), tx.init(params))
        >>> print(updates.round(3))
        [-0.1 -0.1]
    """
    inner = optax.chain(*parts)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if not isinstance(state, (tuple, list)) or len(state) != len(parts):
            got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(
                f"state must be a tuple of the {len(parts)} parts' states, got {got}: "
                "is it what this optimizer's init gave, in update(updates, state, params)?"
            )
        return inner.update(updates, state, params, **extra_args)

    return uphold(optax.GradientTransformationExtraArgs(inner.init, update))
