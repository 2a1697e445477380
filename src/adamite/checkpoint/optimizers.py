"""What differs between two optimizers, as their settings tell it."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

SAYS = {"moments": "storage", "mu_dtype": "storage", "rounding": "weights", "mesh": "mesh", "param_shardings": "mesh"}
"""The arguments of which a difference belongs to one of another kind."""

SPREAD = ("zero1", "placed", "offload")
"""Transformations that say where the state of another one lives, which is "mesh", and change nothing else."""


def of_optimizers(saved: dict[str, Any], now: dict[str, Any], allowed: set[str]) -> Iterator[str]:
    """Each difference that is not allowed, with its path, both values and the name that allows it."""
    for path, was, is_now, kind in _differences("optimizer", saved, now, None):
        names = {kind or path, path}
        if not any(f"{name}.".startswith((f"{one}.", f"{one}[")) for name in names for one in allowed):
            yield f"{path}: saved {was}, now {is_now} (allow {kind or path!r})"


Difference = tuple[str, str, str, str | None]


def _differences(path: str, was: Any, is_now: Any, kind: str | None) -> Iterator[Difference]:
    """Path, both values, and the kind that it belongs to, if that is not the argument itself."""
    if any(isinstance(x, dict) and x.get("name") == "round_weights" for x in (was, is_now)):
        kind = "weights"
    if isinstance(was, list) and isinstance(is_now, list):
        for i, pair in enumerate(itertools.zip_longest(was, is_now, fillvalue=ABSENT)):
            yield from _differences(f"{path}[{i}]", *pair, kind)
        return
    if isinstance(was, dict) and isinstance(is_now, dict):
        names = was.get("name"), is_now.get("name")
        if names[0] != names[1] and any(name in SPREAD for name in names):
            yield path, json.dumps(names[0]), json.dumps(names[1]), "mesh"
            spread = names[0] in SPREAD, names[1] in SPREAD
            was, is_now = (x.get("tx") if wraps else x for x, wraps in zip((was, is_now), spread, strict=True))
            yield from _differences(path, was, is_now, kind)
            return
        for key in sorted(was.keys() | is_now.keys(), key=lambda key: (key != "name", key)):
            its = "mesh" if names[0] in SPREAD and key != "tx" else SAYS.get(key, kind)
            yield from _differences(f"{path}.{key}", was.get(key, ABSENT), is_now.get(key, ABSENT), its)
        return
    ours, theirs = dict(_flat(path, is_now)), dict(_flat(path, was))
    for at in sorted(ours.keys() | theirs.keys()):
        values = [json.dumps(x[at]) if at in x else "nothing" for x in (theirs, ours)]
        if values[0] != values[1]:
            yield at, values[0], values[1], kind


ABSENT = object()
"""In place of an argument that is not there."""


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if value is ABSENT:
        return
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(f"{path}.{key}", item)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _flat(f"{path}[{i}]", item)
    else:
        yield path, value
