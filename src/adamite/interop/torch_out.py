"""From the state of a transformation to a state dict of ``torch.optim.Adam`` or ``AdamW``: `torch_in` backwards."""

from typing import Any

import numpy as np
import optax

from adamite import checks
from adamite.convert import convert_moments
from adamite.interop.arguments import FIXED, NUMBERS, Told, arguments, is_zero
from adamite.interop.comparison import check_same
from adamite.interop.names import Name, Names, Place, path_name, places
from adamite.interop.rule_states import check_amsgrad, distinct, rule_states
from adamite.interop.state_dicts import MOMENTS, keys_of, parsed, step_tensor
from adamite.paths import leaves_with_path

OTHERS = {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
"""Torch's settings that say nothing of the algorithm, and their defaults."""


def to_torch(
    state: optax.OptState, tx: Any, params: optax.Params, mapping: Names | None = None, *, like: Any = None
) -> dict[str, Any]:
    """The state dict with which torch goes on where `tx` stopped.

    Args:
        state: of `tx`, all of it on this host.
        tx: see `from_torch`. Of schedules the value is given that they have now.
        params: our parameters, or their shapes and dtypes.
        mapping: see `from_torch`. Unless it has numbers, its order must be torch's within each group.
        like: a state dict of the torch optimizer that is to go on. Its groups, settings and keys are taken as they are;
            they must be those of `tx`, but for the learning rate. None: torch's groups are made from `tx`. Each group
            of a `partition` is one, in the order of its `transforms` or, if the mapping has numbers, of the numbers.
            Weights that a mask leaves out of the decay are a group of their own, behind the others. Weights that `tx`
            leaves out are in no group.

    Returns:
        The state dict, of NumPy arrays, float32 (float64 for parameters of float64), steps of shape (). In torch::

            for kept in state_dict["state"].values():
                kept.update({name: torch.from_numpy(x) for name, x in kept.items()})
            optimizer.load_state_dict(state_dict)

    Raises:
        ValueError: `tx` does what torch cannot, or does not say what it does (give `like`); `mapping` or the state does
            not fit `params`; the count is above 2^24 and no float32, as torch counts.
        RefusedError: `like` is no such state dict, or of other parameters or settings.
        TypeError: an argument is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adamw
        >>> tx, params = adamw(0.1), {"kernel": jnp.ones((2, 3))}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> state_dict = to_torch(state, tx, params, {"kernel": ("w", (1, 0))})
        >>> {name: x.shape for name, x in state_dict["state"][0].items()}
        {'step': (), 'exp_avg': (3, 2), 'exp_avg_sq': (3, 2)}
        >>> state_dict["param_groups"][0]["betas"], state_dict["param_groups"][0]["decoupled_weight_decay"]
        ((0.9, 0.999), True)
    """
    checks.transformation("tx", tx)
    rules, every = rule_states(state), {place.path for place in places(params, None)}
    for path in rules.keys() - every:
        raise ValueError(f"state must be of params, got moments of {path}")
    spots, told = places(params, mapping, optional=every - rules.keys()), arguments(tx, params, rules)
    stepped = [place for place in spots if place.path in rules]
    if like is None:
        keys, groups = _groups(stepped, told, rules)
    else:
        found = parsed(like, "like")
        keys, groups = keys_of(found, spots, every - rules.keys(), "like"), [dict(x) for x in like["param_groups"]]
        check_same(told, found, {place.path: keys[place.path] for place in stepped}, ("learning_rate",), "like")
        for place in stepped:
            amsgrad = found.settings[found.groups[keys[place.path]]].amsgrad
            check_amsgrad(rules[place.path], amsgrad, place.path, "like")
    moments, kept = _moments(rules), {}
    for place in stepped:
        for name, x in moments[place.path].items():
            if x.shape != place.leaf.shape:
                shapes = f"{place.leaf.shape}, got {x.shape}"
                raise ValueError(f"state must be of params: {name} of {place.path} must have shape {shapes}")
        if count := int(rules[place.path].count):  # torch has no moments before the first step
            arrays = {MOMENTS[name]: place.theirs(np.asarray(x)) for name, x in moments[place.path].items()}
            kept[keys[place.path]] = {"step": step_tensor(count), **arrays}
    return {"state": kept, "param_groups": groups}


def _groups(
    stepped: list[Place], told: dict[str, Told], rules: dict[str, Any]
) -> tuple[dict[str, Name], list[dict[str, Any]]]:
    """Torch's key of each parameter, and its groups: those of `tx`, each in those that decay and those that do not."""
    numbered = all(isinstance(place.name, int) for place in stepped)
    parts: dict[Any, list[Place]] = {}
    for place in sorted(stepped, key=_number) if numbered else stepped:
        one = told[place.path]
        parts.setdefault((one.group, not one.decays or is_zero(one.known.get("weight_decay", 0.0))), []).append(place)
    ordered = [parts[key] for key in sorted(parts)]
    if numbered:
        ordered = sorted(ordered, key=lambda part: _number(part[0]))
        numbers = [_number(place) for part in ordered for place in part]
        if numbers != sorted(numbers):
            raise ValueError(f"mapping must have numbers that count group by group, as torch's do, got {numbers}")
    count = max((int(rule.count) for rule in rules.values()), default=0)
    adamw = any(one.known.get("decoupled") for one in told.values())  # torch's AdamW is so in all groups
    keys: dict[str, Name] = {}
    groups = []
    for part in ordered:
        keys |= {place.path: place.name if numbered else n for n, place in enumerate(part, len(keys))}
        group = {} if numbered else {"param_names": [str(place.name) for place in part]}
        amsgrad = isinstance(rules[part[0].path], optax.ScaleByAmsgradState)
        group |= _settings(told[part[0].path], count) | {"amsgrad": amsgrad, **OTHERS}
        group |= {"decoupled_weight_decay": told[part[0].path].known.get("decoupled", adamw)}
        groups.append(group | {"params": [keys[place.path] for place in part]})
    return keys, groups


def _settings(one: Told, count: int) -> dict[str, Any]:
    """Torch's numbers for a group, of schedules those that they have at this count."""
    for name, value in FIXED.items():
        if one.known.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, torch has nothing else, got {one.known[name]}")
    for name in NUMBERS:
        if name not in one.known:
            raise ValueError(f"tx does not say its {name}: give like, a state dict of the torch optimizer")
    values: list[Any] = [x(count) if callable(x) else x for x in (one.known[name] for name in NUMBERS)]
    rate, b1, b2, eps, decay = map(float, values)
    return {"lr": rate, "betas": (b1, b2), "eps": eps, "weight_decay": decay if one.decays else 0.0}


def _number(place: Place) -> Any:
    return place.name


def _moments(rules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The moments of each parameter, in float32."""
    nodes: Any = distinct(rules)
    found: dict[str, dict[str, Any]] = {path: {} for path in rules}
    for node in convert_moments(nodes, "float32") if nodes else ():
        for name in node._fields[1:]:
            for path, x in leaves_with_path(getattr(node, name)):
                found[path_name(path)][name] = x
    return found
