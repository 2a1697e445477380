"""The state of the one Adam in an optimizer's state."""

from typing import Any

import jax
import optax

from adamite.storage import Quantized

RULES = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)


def rule_state(state: Any) -> Any:
    """The state of Adam or AMSGrad in `state`.

    Raises:
        ValueError: there is none, or there are several.

    Example:
        >>> from adamite import adam, skip_nonfinite
        >>> type(rule_state(skip_nonfinite(adam(0.1)).init(jax.numpy.ones(2)))).__name__
        'ScaleByAdamState'
    """
    nodes = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RULES)) if isinstance(x, RULES)]
    if len(nodes) != 1:
        raise ValueError(f"state of tx must have one ScaleByAdamState or ScaleByAmsgradState in it, got {len(nodes)}")
    return nodes[0]


def moments_of(node: Any, name: str) -> Any:
    """The arrays of a moment that have the parameters' shapes."""
    moment = getattr(node, name)
    return moment.codes if isinstance(moment, Quantized) else moment
