"""A step that is tried, to be measured, and then taken: the one before the other.

The step overwrites the arrays that the trial reads. Where XLA may begin the step first, it copies all of them. So the
step takes what it overwrites from the trial: out of the branch in which the trial may be, or, where each step is tried,
by a condition that is always met, but is not known to XLA to be. Both leave every number as it is, and the operations
of the step, too: an array that came from a selection would be multiplied and added with other roundings.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamite.core.skipping import step_if
from adamite.numerics import is_traced


def tried_if(due: jax.Array, measure: Callable[[], Any], keep: Callable[[], Any], state: Any) -> tuple[Any, Any]:
    """What `measure` gives if it is due, else what `keep` gives; and the state for the step that follows.

    Args:
        due: bool of shape ().
        measure: tries the step.
        keep: gives the like.
        state: the state before the step.
    """
    if not is_traced(due):
        return (measure() if due else keep()), state

    def through() -> Any:
        """The state; without a barrier JAX sees that both branches return what they were given, and leaves it out."""
        return jax.tree.map(jax.lax.optimization_barrier, state)  # leaf by leaf: it makes all vary over the same axes

    return step_if(due, lambda: (measure(), through()), lambda: (keep(), through()))


def counted_after(measured: Any, state: Any) -> Any:
    """The state for a step by a kernel, which reads the count, and so begins after all is measured.

    Args:
        measured: tree of arrays of shape (), none of which is -2.
        state: the state before the step. Without a count it is returned as it is.
    """
    known = jnp.all(jnp.stack(jax.tree.leaves(measured)) != -2)

    def one(x: Any) -> Any:
        count = jnp.shape(x) == () and jnp.issubdtype(x.dtype, jnp.integer)
        return jnp.where(known, x, jnp.zeros_like(x)) if count else x

    return jax.tree.map(one, state) if is_traced(known) else state
