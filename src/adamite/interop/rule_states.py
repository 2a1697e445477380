"""The states of Adam in the state of an optimizer: one for each group of parameters."""

from typing import Any

import jax
import optax

from adamite.checks import RefusedError
from adamite.interop.names import path_name
from adamite.paths import leaves_with_path
from adamite.storage import Quantized

RULES = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)


def rule_states(state: Any) -> dict[str, Any]:
    """The state of Adam or AMSGrad of each parameter that is stepped, by the parameter's path.

    Raises:
        ValueError: there is none, or there are two for one parameter.

    Example:
        >>> from adamite import adam, skip_nonfinite
        >>> {path: type(node).__name__ for path, node in rule_states(adam(0.1).init({"w": jax.numpy.ones(2)})).items()}
        {'w': 'ScaleByAdamState'}
    """
    nodes = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RULES)) if isinstance(x, RULES)]
    must = "state of tx must have one ScaleByAdamState or ScaleByAmsgradState of each parameter"
    if not nodes:
        raise ValueError(f"{must}, got none")
    found: dict[str, Any] = {}
    for node in nodes:
        for path in paths_of(node):
            if path in found:
                raise ValueError(f"{must}, got two of {path}")
            found[path] = node
    return found


def distinct(rules: dict[str, Any]) -> list[Any]:
    """Each of these states once."""
    return list({id(rule): rule for rule in rules.values()}.values())


def paths_of(node: Any) -> list[str]:
    """The parameters of one such state, by their paths."""
    return [path_name(path) for path, _ in leaves_with_path(moments_of(node, "mu"))]


def check_amsgrad(rule: Any, amsgrad: bool, path: str, name: str = "torch") -> None:
    """Refuse a state of a parameter that keeps other moments than torch."""
    if isinstance(rule, optax.ScaleByAmsgradState) != amsgrad:
        raise RefusedError(f"amsgrad: {name} has {amsgrad} for {path}, tx {not amsgrad}")


def moments_of(node: Any, name: str) -> Any:
    """The arrays of a moment that have the parameters' shapes."""
    moment = getattr(node, name)
    return moment.codes if isinstance(moment, Quantized) else moment
