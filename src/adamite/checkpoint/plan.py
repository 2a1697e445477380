"""How a checkpoint becomes the tree that is wanted: which leaves are read, and what is then made of them.

Where a difference is meant, the leaves that are read are those of the checkpoint: what is verified is what was saved.
Then weights are converted, then moments, then dtypes, each by what the wanted tree says.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from adamite.checkpoint import weights
from adamite.checkpoint.differences import SHOWN, of_trees
from adamite.checkpoint.leaves import Leaf, as_like, blank, describe, is_floating, is_number, leaves_of, recast, scalar
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.optimizers import of_optimizers
from adamite.checkpoint.places import is_place, touched, under
from adamite.checkpoint.storages import as_stored
from adamite.checks import RefusedError
from adamite.convert import stored_as
from adamite.convert_weights import Change, converted
from adamite.rounding import SHORT


class Plan(NamedTuple):
    """What is to be read, and what to do then."""

    read: dict[str, Any]
    """The leaves, abstract, by path."""
    finish: Callable[[dict[str, Any]], Any]
    """From these leaves to the tree that is wanted."""


def planned(manifest: Manifest, like: Any, told: dict[str, Any] | None, allowed: set[str], name: str = "tree") -> Plan:
    """How to read what is as `like`, but for what is meant to be different.

    Args:
        manifest: of the saved tree, or of the part of it that is read.
        like: the tree that is wanted.
        told: the settings of the optimizer that goes on, or None.
        allowed: the names of the differences that are meant.
        name: what errors call the tree: "tree", or a part, which may be read without an optimizer.

    Raises:
        RefusedError: there are differences that are not meant; all are named.
    """
    form = as_stored(manifest, like) if "storage" in allowed else like
    places, wanted, ours = [*filter(is_place, allowed)], leaves_of(form), leaves_of(like)
    read, types = dict(wanted), types_of(form)
    saved, saved_types, change = dict(manifest.leaves), dict(manifest.types), Change({}, [])
    if "weights" in allowed:
        change = weights.changed(manifest, like)
        read, saved = weights.as_saved(manifest, change, read), weights.without_counts(manifest, types)
        types, saved_types = weights.without_states(types, saved_types), weights.without_states(saved_types, types)
    is_new = touched(places, [name + path for path in read.keys() | saved.keys() if _differ(read, saved, path)])
    read, saved = ({path: x for path, x in tree.items() if not is_new(name + path)} for tree in (read, saved))
    for path in read.keys() & saved.keys():
        number = scalar(saved[path], read[path])
        if number is not None:
            read[path], saved[path] = number, describe(number)
        elif "dtype" in allowed and _castable(saved[path], read[path], rounded=bool(weights.states(manifest))):
            read[path] = recast(read[path], saved[path])
    now = {path: describe(leaf) for path, leaf in read.items()}
    for path in {before for before, _ in change.weights.values() if before in now}:  # read where its weight will be
        saved[path] = saved[path]._replace(grid=now[path].grid, devices=now[path].devices)
    of_tx = of_optimizers(manifest.optimizer, told or {}, allowed)
    _refuse(
        *(of_tx if told is not None or name == "tree" else ()),
        *of_trees(
            (_apart(saved_types, types, places, name), saved),
            (_apart(types, saved_types, places, name), now),
            {*weights.outside(like)},
            allowed,
            name,
        ),
        *(
            f"{name}{path}: new, but like has no value for it: like must hold an array there"
            for path, leaf in ours.items()
            if isinstance(leaf, jax.ShapeDtypeStruct) and is_new(name + path)
        ),
    )

    def finish(leaves: dict[str, Any]) -> Any:
        leaves = {path: leaf for path, leaf in ours.items() if is_new(name + path)} | converted(leaves, change, ours)
        tree = jax.tree.structure(form).unflatten(
            leaves[path] if path in leaves else blank(leaf) for path, leaf in wanted.items()
        )
        tree = stored_as(tree, like) if "storage" in allowed else tree
        return jax.tree.structure(like).unflatten(
            leaf if is_new(name + path) else as_like(x, leaf, name + path)
            for x, (path, leaf) in zip(jax.tree.leaves(tree), ours.items(), strict=True)
        )

    return Plan(read, finish)


def _refuse(*found: str) -> None:
    """Raise if there is any difference."""
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines = "".join(f"\n  {line}" for line in found[:SHOWN])
        raise RefusedError(f"the checkpoint is another's:{lines}{more}")


def _apart(types: dict[str, str], other: dict[str, str], places: list[str], name: str) -> dict[str, str]:
    """The classes of inner nodes, without those that differ at places where that is meant."""
    return {
        path: kind
        for path, kind in types.items()
        if kind == other.get(path) or not (places and under(places, name + path))
    }


def _differ(read: Mapping[str, Any], saved: Mapping[str, Leaf], path: str) -> bool:
    """Whether a leaf is on one side alone, or has another shape."""
    return path not in read or path not in saved or describe(read[path]).shape != saved[path].shape


def _castable(saved: Leaf, leaf: Any, *, rounded: bool) -> bool:
    """Whether a floating array can be cast. A residual that counts in the spacings of one dtype is none of another."""
    now = describe(leaf)
    floating = not is_number(leaf) and saved.shape == now.shape and is_floating(saved.dtype) and is_floating(now.dtype)
    short = {x.name for x in SHORT}
    return floating and not (rounded and saved.dtype != now.dtype and {saved.dtype, now.dtype} <= short)
