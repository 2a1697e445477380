"""What a transformation says of itself that torch has, too; and where the two differ."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import optax
from jax.tree_util import tree_leaves_with_path

from adamite.checks import RefusedError
from adamite.identity import identity
from adamite.interop.names import Name, path_name
from adamite.interop.settings import common
from adamite.interop.state_dicts import StateDict

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


def arguments(tx: Any) -> dict[str, Any]:
    """Of `ARGUMENTS` those that `tx` has; none if it does not say what it is.

    "decoupled" tells whether it decays weights behind Adam. It is there, as "mask" is, only if weights decay.

    Raises:
        ValueError: it is no Adam that torch has, or decays weights in two places.

    Example:
        >>> from adamite import adamw, skip_nonfinite
        >>> told = arguments(skip_nonfinite(adamw(1e-3, weight_decay=0.1)))
        >>> told["learning_rate"], told["weight_decay"], told["decoupled"]
        (0.001, 0.1, True)
    """
    told = list(_builders(identity(tx)))
    rules = [number for number, of in enumerate(told) if "b1" in of]
    if not rules:
        return {}
    if told[rules[0]]["name"] not in BUILDERS:
        raise ValueError(f"tx must be Adam, AdamW or AMSGrad, got {told[rules[0]]['name']}")
    decays = [number for number, of in enumerate(told) if not _is_zero(of.get("weight_decay", 0.0))]
    if len(decays) > 1:
        raise ValueError(f"tx must decay weights in one place, got {' and '.join(told[n]['name'] for n in decays)}")
    known = {name: x for of in reversed(told) for name, x in of.items() if name in (*NUMBERS, *FIXED)}
    known["weight_decay"] = 0.0
    for number in decays:
        known |= {name: told[number][name] for name in ("weight_decay", "mask")} | {"decoupled": number >= rules[0]}
    return known


def check_same(
    known: dict[str, Any], found: StateDict, keys: dict[str, Name], params: optax.Params, allow: Collection[str]
) -> None:
    """Refuse settings of torch's that are not the transformation's, but for schedules and what is allowed.

    Raises:
        RefusedError: one differs; names it and both values.
    """
    its = common(found.settings)
    theirs: dict[str, Any] = FIXED | {name: getattr(its, name) for name in NUMBERS}
    if its.weight_decay and its.decoupled is not None:
        theirs["decoupled"] = its.decoupled
    for name, value in theirs.items():
        ours = known.get(name, value)
        # Torch's may have been rounded to float32, in which all is computed.
        if name not in allow and not callable(ours) and not math.isclose(value, float(ours), rel_tol=1e-7):
            raise RefusedError(f"{name}: torch has {value}, tx {ours}; allow={(name,)} keeps that of tx")
    if its.weight_decay and "mask" in known and "mask" not in allow:
        for path, ours in decaying(known["mask"], params).items():
            if ours != bool(found.settings[found.groups[keys[path]]].weight_decay):
                one, other = ("tx", "torch") if ours else ("torch", "tx")
                raise RefusedError(f"mask: {one} decays {path}, {other} does not; allow=('mask',) keeps that of tx")


def decaying(mask: Any, params: optax.Params) -> dict[str, bool]:
    """Whether each parameter decays, by its path."""
    mask = mask(params) if callable(mask) else True if mask is None else mask
    whole = jax.tree.map(lambda one, below: jax.tree.map(lambda _: bool(one), below), mask, params)
    return {path_name(path): one for path, one in tree_leaves_with_path(whole)}


def _builders(of: Any) -> Iterator[dict[str, Any]]:
    """All identities in one, the outer first, a chain's in its order."""
    if isinstance(of, dict) and isinstance(of.get("name"), str):
        yield of
    for one in of.values() if isinstance(of, dict) else of if isinstance(of, tuple) else ():
        yield from _builders(one)


def _is_zero(decay: Any) -> bool:
    return not callable(decay) and float(decay) == 0
