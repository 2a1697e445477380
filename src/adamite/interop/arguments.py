"""What a transformation says of each parameter that torch says, too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from adamite.grouping import labels_of, partition
from adamite.identity import identity
from adamite.interop.names import path_name
from adamite.paths import leaves_with_path

BUILDERS = ("adam", "adamw", "scale_by_adam", "amsgrad", "scale_by_amsgrad")
FIXED = {
    "eps_root": 0.0,
    "nesterov": False,
    "bias_correction": True,
    "bias_correction_mu": True,
    "bias_correction_nu": True,
    "max_before_correction": True,
    "after_learning_rate": False,
    "flip_sign": True,
}
"""Arguments of ours for which torch has one value only."""

NUMBERS = ("learning_rate", "b1", "b2", "eps", "weight_decay")
ARGUMENTS = (*NUMBERS, "decoupled", "mask", *FIXED)


class Told(NamedTuple):
    """What a transformation says of one parameter."""

    group: tuple[int, ...]  # its group in each `partition`, then which of the states of Adam has its moments
    known: dict[str, Any]  # of `ARGUMENTS` those that it has; none if it does not say what it is
    decays: bool  # whether its weight decay, if it has one, is for this parameter


def arguments(tx: Any, params: optax.Params, rules: dict[str, Any]) -> dict[str, Told]:
    """What `tx` says of each parameter that it steps, by its path.

    "decoupled" tells whether it decays weights behind Adam. It is there, as "mask" is, only if weights decay.

    Args:
        tx: the transformation.
        params: our parameters, or their shapes and dtypes.
        rules: see `rule_states`, of a state of `tx`.

    Raises:
        ValueError: it is no Adam that torch has, or decays weights in two places.

    Example:
        >>> from adamite import adamw, skip_nonfinite
        >>> from adamite.interop.rule_states import rule_states
        >>> tx, params = skip_nonfinite(adamw(1e-3, weight_decay=0.1)), {"w": jax.numpy.ones(2)}
        >>> told = arguments(tx, params, rule_states(tx.init(params)))["w"]
        >>> told.known["learning_rate"], told.known["weight_decay"], told.known["decoupled"], told.decays
        (0.001, 0.1, True, True)
    """
    of = identity(tx)
    labels: dict[int, dict[str, Any]] = {}
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    decays: dict[tuple[int, ...], dict[str, bool]] = {}

    def number(one: Any, path: str) -> int:
        if id(one) not in labels:
            labels[id(one)] = spread(labels_of(one["param_labels"], params), params)
        return list(one["transforms"]).index(labels[id(one)][path])

    order = list(dict.fromkeys(map(id, rules.values())))
    found = {}
    for path, rule in rules.items():
        builders, group = _route(of, path, number)
        if group not in known:
            known[group] = _known(builders)
            decays[group] = decaying(known[group].get("mask"), params)
        found[path] = Told((*group, order.index(id(rule))), known[group], decays[group][path])
    return found


def decaying(mask: Any, params: optax.Params) -> dict[str, bool]:
    """Whether each parameter decays, by its path."""
    mask = mask(params) if callable(mask) else True if mask is None else mask
    return {path: bool(one) for path, one in spread(mask, params).items()}


def spread(prefix: Any, params: optax.Params) -> dict[str, Any]:
    """What a prefix of the parameters' structure says of each parameter, by its path."""
    whole = jax.tree.map(lambda one, below: jax.tree.map(lambda _: one, below), prefix, params)
    return {path_name(path): one for path, one in leaves_with_path(whole)}


def _route(of: Any, path: str, number: Callable[[Any, str], int]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """All identities in one, the outer first, a chain's in its order; of each partition those of one group, and which.

    Args:
        of: the identity.
        path: the parameter's.
        number: the group of a parameter in a partition.
    """
    if isinstance(of, dict) and of.get("name") == partition.__name__:
        chosen = number(of, path)
        builders, group = _route(list(of["transforms"].values())[chosen], path, number)
        return builders, (chosen, *group)
    own = [of] if isinstance(of, dict) and isinstance(of.get("name"), str) else []
    inside = [_route(one, path, number) for one in (own[0].values() if own else of if isinstance(of, tuple) else ())]
    return own + [one for builders, _ in inside for one in builders], tuple(n for _, group in inside for n in group)


def _known(told: list[dict[str, Any]]) -> dict[str, Any]:
    rules = [number for number, of in enumerate(told) if "b1" in of]
    if not rules:
        return {}
    if told[rules[0]]["name"] not in BUILDERS:
        raise ValueError(f"tx must be Adam, AdamW or AMSGrad, got {told[rules[0]]['name']}")
    decays = [number for number, of in enumerate(told) if not is_zero(of.get("weight_decay", 0.0))]
    if len(decays) > 1:
        raise ValueError(f"tx must decay weights in one place, got {' and '.join(told[n]['name'] for n in decays)}")
    known = {name: x for of in reversed(told) for name, x in of.items() if name in (*NUMBERS, *FIXED)}
    known["weight_decay"] = 0.0
    for number in decays:
        known |= {name: told[number][name] for name in ("weight_decay", "mask")} | {"decoupled": number >= rules[0]}
    return known


def is_zero(decay: Any) -> bool:
    """Whether it is 0, and no schedule."""
    return not callable(decay) and float(decay) == 0
