"""A step that is tried to be measured, and then taken: first the one, then the other.

The step overwrites the arrays that the trial reads. Where XLA may do the one before the other it copies all of them.
Barriers do not help: XLA's CPU compiler removes them before it copies. So what the step reads is selected by a
condition on what the trial has measured, which is always met, but is not known to XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adamite.numerics import is_traced
from adamite.storage import Quantized


def begun_after(measured: Any, grads: Any, state: Any, *, by_count: bool) -> tuple[Any, Any]:
    """``(grads, state)``, to the bit, but such that no step with them is begun before all is measured.

    Args:
        measured: tree of arrays of shape (), none of which is -2.
        grads: tree of gradients.
        state: the state before the step.
        by_count: whether all that the step writes needs the state's counts: what kernels write does, and what steps in
            slices write. XLA's own steps write moments that need no count; but the gradients, which they read anyway.
            Without a count in the state it is the gradients, too.
    """
    known = jnp.all(jnp.stack(jax.tree.leaves(measured)) != -2)
    if not is_traced(known):
        return grads, state

    def tied(x: jax.Array) -> jax.Array:
        return jnp.where(known, x, jnp.zeros_like(x))

    if by_count and any(map(_is_count, jax.tree.leaves(state))):
        return grads, jax.tree.map(lambda x: tied(x) if _is_count(x) else x, state)
    return jax.tree.map(tied, grads), state


def in_blocks(state: Any) -> bool:
    """Whether the state has moments in blocks, which large leaves step in slices."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantized))
    return any(isinstance(x, Quantized) for x in nodes)


def _is_count(x: Any) -> bool:
    return jnp.shape(x) == () and jnp.issubdtype(x.dtype, jnp.integer)
