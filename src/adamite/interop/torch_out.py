"""From the state of a transformation to a state dict of ``torch.optim.Adam`` or ``AdamW``: `torch_in` backwards."""

from typing import Any

import jax
import numpy as np
import optax

from adamite import checks
from adamite.checks import RefusedError
from adamite.convert import convert_moments
from adamite.interop.arguments import FIXED, NUMBERS, arguments, check_same, decaying
from adamite.interop.names import Name, Names, Place, path_name, places
from adamite.interop.rule_states import rule_state
from adamite.interop.settings import common
from adamite.interop.state_dicts import MOMENTS, keys_of, parsed, step_tensor

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
        mapping: see `from_torch`. Unless it has numbers, its order must be that of torch's parameters. Weights that a
            mask leaves out of the decay are a second group.
        like: a state dict of the torch optimizer that is to go on. Its groups, settings and keys are taken as they are;
            they must be those of `tx`, but for the learning rate.

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
    node, spots, known = rule_state(state), places(params, mapping), arguments(tx)
    count, amsgrad = int(node.count), isinstance(node, optax.ScaleByAmsgradState)
    if like is None:
        keys, groups = _groups(known, spots, params, count, amsgrad)
    else:
        found = parsed(like)
        keys, groups = keys_of(found, spots), [dict(group) for group in like["param_groups"]]
        check_same(known, found, keys, params, ("learning_rate",))
        if common(found.settings).amsgrad != amsgrad:
            raise RefusedError(f"amsgrad: like has {not amsgrad}, tx {amsgrad}")
    wide: Any = convert_moments(node, "float32")
    columns = {name: _by_path(getattr(wide, name)) for name in wide._fields[1:]}
    own = [place for place in spots if count and place.path in columns["mu"]]  # torch has no moments at first
    _check_shapes(columns, own, spots)
    kept = {
        keys[place.path]: {"step": step_tensor(count)}
        | {MOMENTS[name]: place.theirs(np.asarray(column[place.path])) for name, column in columns.items()}
        for place in own
    }
    return {"state": kept, "param_groups": groups}


def _groups(
    known: dict[str, Any], spots: list[Place], params: optax.Params, count: int, amsgrad: bool
) -> tuple[dict[str, Name], list[dict[str, Any]]]:
    """Torch's key of each parameter, and its groups: those that decay and those that do not."""
    for name, value in FIXED.items():
        if known.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, torch has nothing else, got {known[name]}")
    for name in NUMBERS:
        if name not in known:
            raise ValueError(f"tx does not say its {name}: give like, a state dict of the torch optimizer")
    rate, b1, b2, eps, decay = (float(known[name](count) if callable(known[name]) else known[name]) for name in NUMBERS)
    decays = decaying(known.get("mask"), params)
    numbered = all(isinstance(place.name, int) for place in spots)
    spots = sorted(spots, key=lambda place: place.name) if numbered else spots
    parts = [part for sign in (True, False) if (part := [place for place in spots if decays[place.path] == sign])]
    ordered = [place for part in parts for place in part]
    keys: dict[str, Name] = {place.path: place.name if numbered else n for n, place in enumerate(ordered)}
    groups = []
    for part in parts:
        group = {} if numbered else {"param_names": [str(place.name) for place in part]}
        group |= {"lr": rate, "betas": (b1, b2), "eps": eps, "weight_decay": decay if decays[part[0].path] else 0.0}
        group |= {"amsgrad": amsgrad, **OTHERS, "decoupled_weight_decay": bool(known.get("decoupled", False))}
        groups.append(group | {"params": [keys[place.path] for place in part]})
    return keys, groups


def _by_path(moment: Any) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(moment)}


def _check_shapes(columns: dict[str, dict[str, Any]], own: list[Place], spots: list[Place]) -> None:
    """Refuse a state of other parameters."""
    for name, column in columns.items():
        for path in column.keys() - {place.path for place in spots}:
            raise ValueError(f"state must be of params, got {name} of {path}")
        for place in own:
            if column[place.path].shape != place.leaf.shape:
                shapes = f"{place.leaf.shape}, got {column[place.path].shape}"
                raise ValueError(f"state must be of params: {name} of {place.path} must have shape {shapes}")
