"""Where what a transformation says of a parameter differs from what torch has for it."""

import math
from collections.abc import Collection
from typing import Any

from adamite.checks import RefusedError
from adamite.interop.arguments import FIXED, NUMBERS, Told, is_zero
from adamite.interop.names import Name
from adamite.interop.settings import Settings
from adamite.interop.state_dicts import StateDict


def check_same(
    told: dict[str, Told], found: StateDict, keys: dict[str, Name], allow: Collection[str], name: str = "torch"
) -> None:
    """Refuse settings of torch's that are not those of `tx`, but for what is allowed.

    An argument that is a schedule, or that `tx` does not say, is compared with nothing. But torch must then have one
    value for all parameters of a group of `tx`.

    Args:
        told: what `tx` says.
        found: the state dict.
        keys: torch's keys of the parameters to compare, by their paths.
        allow: of `arguments.ARGUMENTS` those that may differ.
        name: what the state dict is called in an error.

    Raises:
        RefusedError: one differs; names it, the parameter and both values.
    """
    settings = {path: found.settings[found.groups[key]] for path, key in keys.items()}
    some_decay = {told[path].group for path, its in settings.items() if its.weight_decay}
    uncompared: dict[Any, tuple[str, float]] = {}
    for path, its in settings.items():
        one = told[path]
        ours, theirs = one.known if one.decays else one.known | {"weight_decay": 0.0}, _arguments(its)
        decays = not is_zero(ours.get("weight_decay", its.weight_decay))
        if decays != bool(its.weight_decay) and "mask" in ours and one.group in some_decay:
            if "mask" not in allow:
                first, second = ("tx", name) if decays else (name, "tx")
                raise RefusedError(f"mask: {first} decays {path}, {second} does not; allow=('mask',) keeps that of tx")
            theirs = {argument: x for argument, x in theirs.items() if argument not in ("weight_decay", "decoupled")}
        where = f" for {path}" if len(found.settings) > 1 else ""
        for argument, value in theirs.items():
            mine = ours.get(argument)
            if argument in allow or (argument == "weight_decay" and not value and (mine is None or callable(mine))):
                continue
            keep = f"allow={(argument,)} keeps that of tx"
            if mine is None or callable(mine):
                other, seen = uncompared.setdefault((one.group, argument), (path, value))
                if not _close(seen, value):
                    has = "does not say its own" if mine is None else "one schedule for both"
                    raise RefusedError(f"{argument}: {name} has {seen} for {other}, {value}{where}, tx {has}; {keep}")
            elif not _close(value, float(mine)):
                raise RefusedError(f"{argument}: {name} has {value}{where}, tx {mine}; {keep}")


def _arguments(its: Settings) -> dict[str, Any]:
    """Torch's settings as our arguments."""
    decoupled = {"decoupled": its.decoupled} if its.weight_decay and its.decoupled is not None else {}
    return FIXED | {argument: getattr(its, argument) for argument in NUMBERS} | decoupled


def _close(one: float, other: float) -> bool:
    """Whether two settings are the same: torch's may have been rounded to float32, in which all is computed."""
    return math.isclose(one, other, rel_tol=1e-7)
