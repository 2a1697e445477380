"""What a state dict of ``torch.optim.Adam`` or ``AdamW`` looks like. It is looked through before it is used.

    {"state": {key: {"step": t, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}, ...},    v_max with amsgrad
     "param_groups": [{"params": [key, ...], "lr": ..., "betas": ..., "eps": ..., ...}, ...]}

A key is the parameter's number in the order of the groups or, as FSDP and ``torch.distributed.checkpoint`` gather it,
its name. Tensors are whatever has a shape and a dtype and becomes a NumPy array.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from adamite import checks
from adamite.checks import RefusedError
from adamite.interop.names import Name, Place
from adamite.interop.settings import Settings, checked, settings_of, shown

MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
"""A state's fields, and what torch calls them."""

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Kept(NamedTuple):
    """What torch keeps of one parameter."""

    step: int
    tensors: dict[str, Any]  # by torch's names; empty before the first step


class StateDict(NamedTuple):
    """A state dict that was looked through, but for the tensors' shapes and numbers."""

    settings: list[Settings]  # one a group
    groups: dict[Name, int]  # each parameter's group, in torch's order
    names: dict[str, Name]  # the keys of parameters whose names the groups tell
    state: dict[Name, Kept]


def parsed(state_dict: Any, name: str = "state_dict") -> StateDict:
    """The state dict, looked through; `name` is what it is called in an error.

    Raises:
        TypeError: it is no dict.
        RefusedError: it is not one of ``torch.optim.Adam`` or ``AdamW``, or is damaged; or it maximizes.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{name} must be a dict, got {shown(state_dict)}")
    if set(state_dict) != {"state", "param_groups"}:
        raise RefusedError(f"{name} must have the keys 'state' and 'param_groups', got {shown(list(state_dict))}")
    state, param_groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(param_groups, (list, tuple)) or not param_groups:
        raise RefusedError(f"param_groups must be a list of at least one dict, got {shown(param_groups)}")
    settings: list[Settings] = []
    groups: dict[Name, int] = {}
    names: dict[str, Name] = {}
    for number, group in enumerate(param_groups):
        where = f"param_groups[{number}]"
        settings.append(settings_of(group, where))
        for key in _keys(group["params"], where):
            if key in groups:
                raise RefusedError(f"{where}['params'] has {key!r:.80} a second time")
            groups[key] = number
        for name, key in _named(group, where):
            if name in names:
                raise RefusedError(f"{where}['param_names'] has {name!r:.80} a second time")
            names[name] = key
    if not isinstance(state, Mapping):
        raise RefusedError(f"state must be a dict, got {shown(state)}")
    for key in state:
        if type(key) not in (int, str) or key not in groups:
            raise RefusedError(f"state has an entry {key!r:.80}, which is in no group")
    kept = {key: _kept(state.get(key, {}), settings[group].amsgrad, f"state[{key!r}]") for key, group in groups.items()}
    return StateDict(settings, groups, names, kept)


def keys_of(
    found: StateDict, places: list[Place], optional: Collection[str] = (), name: str = "state_dict"
) -> dict[str, Name]:
    """Torch's key of each of our parameters, by its path.

    Args:
        found: the state dict.
        places: our parameters.
        optional: the paths of those that torch need not have, as they are not stepped.
        name: what the state dict is called in an error.

    Raises:
        RefusedError: one has none there, or one there none of ours; or it would be a guess.
    """
    keys: dict[str, Name] = {}
    named = bool(found.names) or any(isinstance(key, str) for key in found.groups)
    for place in places:
        key = place.name if place.name in found.groups else found.names.get(str(place.name))
        if key is not None:
            keys[place.path] = key
        elif place.path in optional:
            continue
        elif isinstance(place.name, str) and not named:
            raise RefusedError(
                f"{name} has numbers and no names, and their order is not guessed: give a mapping from the paths of "
                f"params, as {place.path!r}, to numbers"
            )
        else:
            there = shown(list(found.names or found.groups))
            raise RefusedError(
                f"params has {place.path!r}, torch no {place.name!r}, only {there}; "
                f"if it is not trained, freeze it: torch_optimizer(..., frozen={place.path!r})"
            )
    taken = set(keys.values())
    for key in found.groups:
        if key not in taken:
            raise RefusedError(f"torch has a parameter {key!r:.80}, params none for it")
    if len(taken) < len(keys):
        raise RefusedError("mapping must give each parameter another of torch's, got one by its number and its name")
    return keys


def check_type(tensor: Any, place: Place, where: str) -> None:
    """Refuse a moment that has not the parameter's shape, or is no floating array or a wider one than ours."""
    own = place.leaf.dtype.name
    if own not in BYTES:
        raise ValueError(f"params must be of real floating dtypes, got {own} for {place.path}")
    if tuple(tensor.shape) != place.shape:
        raise RefusedError(f"{where} must have shape {place.shape}, got {tuple(tensor.shape)}")
    if BYTES[dtype := _floating(tensor, where)] > max(BYTES[own], 4):
        raise RefusedError(f"{where} must be at most float32, got {dtype}: cast it first")


def numbers(tensor: Any, where: str, *, unsigned: bool) -> np.ndarray:
    """A moment's numbers, at least float32.

    Raises:
        RefusedError: it is no floating array; a number is not finite or, where all must be >= 0, negative.
    """
    narrow = BYTES[_floating(tensor, where)] < 4
    if hasattr(tensor, "detach"):  # torch's own; NumPy knows no bfloat16 of torch's
        tensor = tensor.detach().cpu().float() if narrow else tensor.detach().cpu()
    array = np.asarray(tensor, np.float32 if narrow else None)
    if not np.isfinite(array).all():
        raise RefusedError(f"{where} must be finite, got {array[~np.isfinite(array)][0]}")
    if unsigned and (array < 0).any():
        raise RefusedError(f"{where} must be >= 0, got {array.min()}")
    return array


def step_tensor(step: int) -> np.ndarray:
    """A step as torch has it: a float32 of shape ().

    Raises:
        ValueError: it is none: above 2^24 only every other number is.
    """
    if int(np.float32(step)) != step:
        raise ValueError(f"step must be a whole number that float32 holds, as torch counts in it, got {step}")
    return np.asarray(np.float32(step))


def _floating(tensor: Any, where: str) -> str:
    """The name of a tensor's dtype."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in BYTES:
        raise RefusedError(f"{where} must be of a floating dtype, got {dtype:.80}")
    return dtype


def _keys(keys: Any, where: str) -> list[Name]:
    if not isinstance(keys, (list, tuple)):
        raise RefusedError(f"{where}['params'] must be a list of numbers or names, got {shown(keys)}")
    for key in keys:
        if type(key) not in (int, str):
            raise RefusedError(f"{where}['params'] must be a list of numbers or names, got {shown(key)} in it")
    return list(keys)


def _named(group: Mapping[str, Any], where: str) -> Iterable[tuple[str, Name]]:
    names = group.get("param_names")
    if names is None:
        return ()
    if (
        not isinstance(names, (list, tuple))
        or len(names) != len(group["params"])
        or not all(isinstance(name, str) for name in names)
    ):
        raise RefusedError(f"{where}['param_names'] must be a list of a name for each of 'params', got {shown(names)}")
    return zip(names, group["params"], strict=True)


def _kept(entry: Any, amsgrad: bool, where: str) -> Kept:
    if not isinstance(entry, Mapping):
        raise RefusedError(f"{where} must be a dict, got {shown(entry)}")
    if not entry:
        return Kept(0, {})
    fields = [name for name in MOMENTS.values() if amsgrad or name != "max_exp_avg_sq"]
    if set(entry) != {"step", *fields}:
        raise RefusedError(f"{where} must have the fields step, {', '.join(fields)}, got {shown(list(entry))}")
    for name in fields:
        if not (isinstance(getattr(entry[name], "shape", None), tuple) and hasattr(entry[name], "dtype")):
            raise RefusedError(f"{where}[{name!r}] must be a tensor, got {shown(entry[name])}")
    if len({tuple(entry[name].shape) for name in fields}) > 1:
        raise RefusedError(
            f"{where} must have moments of one shape, got {[tuple(entry[name].shape) for name in fields]}"
        )
    step = checked(checks.non_negative, entry["step"], f"{where}['step']")
    if step != int(step) or step >= 2**31:
        raise RefusedError(f"{where}['step'] must be a whole number below 2^31, got {step}")
    return Kept(int(step), {name: entry[name] for name in fields})
