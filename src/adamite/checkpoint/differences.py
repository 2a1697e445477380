"""What differs between a checkpoint and what it is to be restored into; and which differences are meant.

Every difference has a name, which `allow` takes:

    optimizer.learning_rate     an argument of the optimizer; "optimizer" is all of them
    storage                     how moments are kept: they are converted, with the arguments that say how
    dtype                       floating arrays in another dtype: they are cast
    mesh                        arrays cut otherwise, or on another number of devices, and the arguments that say how

All else (a path that is missing, a shape, another class of state) cannot be allowed: it would be another run.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from adamite import checks
from adamite.checkpoint.leaves import Leaf, describe, leaves_of
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.meant import as_stored, as_typed, is_floating
from adamite.checkpoint.settings import settings
from adamite.checks import RefusedError
from adamite.engine.per_leaf import Counted
from adamite.storage import Quantized

KINDS = ("storage", "dtype", "mesh")
SAYS = {"moments": "storage", "mu_dtype": "storage", "mesh": "mesh", "param_shardings": "mesh"}
"""The optimizer's arguments of which a difference belongs to another."""
SHOWN = 12


def names(allow: Any) -> set[str]:
    """The differences that are meant.

    Raises:
        ValueError: there is no such difference.
        TypeError: it is no string and holds none.
    """
    allowed = checks.strings("allow", allow)
    for name in allowed:
        if name not in KINDS and not f"{name}.".startswith("optimizer."):
            raise ValueError(f"allow must hold {', '.join(KINDS)} or optimizer.ARGUMENT, got {name!r:.80}")
    return allowed


def compare(manifest: Manifest, like: Any, tx: Any, allowed: set[str]) -> Any:
    """The abstract tree that is to be read: `like`, but for what is meant to be different.

    Raises:
        RefusedError: there are differences that are not meant; all are named.
    """
    saved = as_stored(manifest, like) if "storage" in allowed else like
    saved = as_typed(manifest, saved) if "dtype" in allowed else saved
    found = [*_of_settings(manifest.optimizer, settings(tx) if tx is not None else {}, allowed)]
    found += _of_trees(manifest, saved, allowed)
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines = "".join(f"\n  {line}" for line in found[:SHOWN])
        raise RefusedError(f"the checkpoint is another's:{lines}{more}")
    return saved


def _of_settings(saved: dict[str, Any], now: dict[str, Any], allowed: set[str]) -> Iterator[str]:
    ours, theirs = dict(_flat("optimizer", now)), dict(_flat("optimizer", saved))
    for path in sorted(ours.keys() | theirs.keys()):
        was, is_now = (json.dumps(x[path]) if path in x else "nothing" for x in (theirs, ours))
        name = SAYS.get(_argument(path), path)
        if was != is_now and not any(f"{name}.".startswith((f"{one}.", f"{one}[")) for one in allowed):
            yield f"{path}: saved {was}, now {is_now} (allow {name!r})"


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(f"{path}.{key}", item)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _flat(f"{path}[{i}]", item)
    else:
        yield path, value


def _argument(path: str) -> str:
    """The name of the innermost argument that says another kind of difference; "" if none does."""
    words = path.replace("[", ".").split(".")
    return next((word for word in reversed(words) if word in SAYS), "")


def _of_trees(manifest: Manifest, like: Any, allowed: set[str]) -> Iterator[str]:
    types, leaves = types_of(like), {path: describe(leaf) for path, leaf in leaves_of(like).items()}
    for path in sorted(types.keys() | manifest.types.keys()):
        was, is_now = manifest.types.get(path, "nothing"), types.get(path, "nothing")
        if was != is_now and path not in manifest.leaves and path not in leaves:
            yield f"tree{path}: saved {was}, now {is_now}{_hint(was, is_now)}"
    for path in sorted(leaves.keys() | manifest.leaves.keys()):
        saved, now = manifest.leaves.get(path), leaves.get(path)
        if saved is None or now is None:
            yield f"tree{path}: saved {_words(saved)}, now {_words(now)}"
        elif (saved.shape, saved.dtype) != (now.shape, now.dtype):
            castable = saved.shape == now.shape and all(map(is_floating, (saved.dtype, now.dtype)))
            yield f"tree{path}: saved {_words(saved)}, now {_words(now)}" + (" (allow 'dtype')" if castable else "")
        elif "mesh" not in allowed and (saved.grid, saved.devices) != (now.grid, now.devices):
            yield f"tree{path}: saved {_where(saved)}, now {_where(now)} (allow 'mesh')"


def _hint(was: str, is_now: str) -> str:
    kept = {Quantized.__name__, Counted.__name__}
    return " (allow 'storage')" if kept & {was, is_now} and "nothing" not in (was, is_now) else ""


def _words(leaf: Leaf | None) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _where(leaf: Leaf) -> str:
    if not leaf.devices:
        return "on the host"
    cut = " x ".join(map(str, leaf.grid)) if math.prod(leaf.grid) > 1 else "one"
    return f"in {cut} part{'s' * (cut != 'one')} on {leaf.devices} device{'s' * (leaf.devices > 1)}"
