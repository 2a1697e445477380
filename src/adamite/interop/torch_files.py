"""State dicts of torch's as safetensors files.

    "state.<key>.<field>"      the tensors
    "param_groups"             in the file's metadata, as JSON

A file of ``torch.save`` is a pickle, and a pickle is a program; this is none.
"""

import json
import os
from typing import Any

import numpy as np

from adamite.checks import RefusedError
from adamite.interop.files import File, opened, replace
from adamite.interop.names import Name
from adamite.interop.settings import shown
from adamite.interop.state_dicts import numbers, parsed, step_tensor

LONGEST = 2**24
"""Characters of the groups' JSON: a million parameters take half of it."""

RECIPE = """\
    found = torch.load(path, weights_only=True)  # optimizer.state_dict(), see docs/interop.md
    tensors = {f"state.{key}.{field}": x for key, kept in found["state"].items() for field, x in kept.items()}
    safetensors.torch.save_file(tensors, "adam.safetensors", {"param_groups": json.dumps(found["param_groups"])})"""
"""How a state dict gets out of a pickle, in torch."""


def read_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A state dict from a file of `write_torch`, or of the recipe for torch in the manual.

    Args:
        path: of the file.

    Returns:
        The state dict, its tensors NumPy arrays, checked as `from_torch` checks it.

    Raises:
        RefusedError: the file is damaged or foreign, whatever its bytes are. Nothing larger than the file is allocated.
            A file of ``torch.save`` is refused, too; the error has the lines that write it anew.
        OSError: it cannot be opened.

    Example:
        >>> import tempfile
        >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
        >>> kept = {"step": np.float32(7), "exp_avg": np.ones(2, np.float32), "exp_avg_sq": np.ones(2, np.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_torch(f"{folder}/adam.safetensors", {"state": {0: kept}, "param_groups": [group]})
        ...     again = read_torch(f"{folder}/adam.safetensors")
        >>> print(again["state"][0]["step"], again["param_groups"] == [group])
        7.0 True
    """
    with opened(path, RECIPE) as file:
        groups = _groups(file)
        keys = {str(key): key for key in parsed({"state": {}, "param_groups": groups}).groups}
        state: dict[Name, dict[str, np.ndarray]] = {}
        for name in file.headers:
            key, _, field = name.removeprefix("state.").rpartition(".")
            if not name.startswith("state.") or key not in keys:
                raise RefusedError(f"{file.path}: {name!r:.80} must be state.KEY.FIELD, of a key in param_groups")
            state.setdefault(keys[key], {})[field] = file.read(name)
    _arrays(state_dict := {"state": state, "param_groups": groups})
    return state_dict


def write_torch(path: str | os.PathLike[str], state_dict: Any) -> None:
    """A state dict as a file: to keep, or for torch to read. An old file is replaced in one piece.

    Tensors of 16 bits become float32, which holds them exactly.

    Args:
        path: of the file.
        state_dict: as `to_torch` makes it, or torch's own.

    Raises:
        RefusedError: the state dict is damaged or foreign.
        TypeError: it is no dict; its groups hold something that is no JSON.
        OSError: the file cannot be written.
    """
    arrays = _arrays(state_dict)
    try:
        groups = json.dumps(state_dict["param_groups"], default=lambda tensor: tensor.item())
    except (AttributeError, ValueError) as error:
        raise TypeError(f"param_groups must hold numbers, strings, lists and None only: {error}") from None
    replace(path, arrays, {"format": "pt", "param_groups": groups})


def _arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """The tensors of a state dict as they are in a file, all checked."""
    found = parsed(state_dict)
    if len({str(key) for key in found.groups}) < len(found.groups):
        raise RefusedError("param_groups must have keys that differ as text, got a number that is a name, too")
    arrays = {}
    for key, kept in found.state.items():
        if kept.tensors:
            arrays[f"state.{key}.step"] = step_tensor(kept.step)
        for name, tensor in kept.tensors.items():
            where = f"state.{key}.{name}"
            arrays[where] = np.asarray(numbers(tensor, where, unsigned=name != "exp_avg"), order="C")
    return arrays


def _groups(file: File) -> list[Any]:
    """The ``param_groups`` of a file."""
    text = file.metadata.get("param_groups", "")
    if not 0 < len(text) <= LONGEST:
        raise RefusedError(f"{file.path} must have param_groups of at most {LONGEST} characters, got {len(text)}")
    try:
        groups = json.loads(text)
    except (ValueError, RecursionError):
        raise RefusedError(f"{file.path} must have param_groups in JSON, got {text!r:.80}") from None
    if not isinstance(groups, list):
        raise RefusedError(f"{file.path} must have a list of param_groups, got {shown(groups)}")
    for group in groups:
        if isinstance(group, dict) and isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])  # as torch has it
    return groups
