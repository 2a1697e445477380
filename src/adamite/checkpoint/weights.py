"""What is to be read where weights are meant to be kept in another way: in the checkpoint's dtype, with its residuals.

What the checkpoint says is not trusted: it is taken over where weights of the wanted tree have it, and else refused.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.tree_util import keystr

from adamite.checkpoint.leaves import Leaf, describe, dtype_of, retyped
from adamite.checkpoint.manifest import Manifest
from adamite.checks import RefusedError
from adamite.convert_weights import Change, Laid, changes, laid
from adamite.core import RoundingState
from adamite.core.placement import fitted
from adamite.paths import leaves_with_path

ROUNDED, EMPTY = RoundingState.__name__, optax.EmptyState.__name__


def states(manifest: Manifest) -> list[str]:
    """Where the checkpoint has the state of a rounding."""
    return [path for path, name in manifest.types.items() if name == ROUNDED]


def outside(like: Any) -> list[str]:
    """The paths of the leaves that belong to no optimizer's state: to no class of Optax or Adamite."""

    def is_state(node: Any) -> bool:
        return isinstance(node, tuple) and type(node).__module__.split(".")[0] in ("optax", "adamite")

    return [keystr(path) for path, node in leaves_with_path(like, is_state) if not is_state(node)]


def changed(manifest: Manifest, like: Any) -> Change:
    """The weights that the checkpoint and `like` keep in different ways.

    Raises:
        RefusedError: it cannot be told which weights a residual belongs to.
    """
    absent = [path for path, name in manifest.types.items() if name == optax.MaskedNode.__name__]
    saved = {path: _numbers(leaf) for path, leaf in manifest.leaves.items()}
    ours = laid(like)
    now = {path: _numbers(describe(leaf)) for path, leaf in ours.leaves.items()}
    try:
        return changes(Laid(saved, states(manifest), absent), ours._replace(leaves=now), outside(like))
    except ValueError as error:
        raise RefusedError(str(error)) from None


def as_saved(manifest: Manifest, change: Change, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves`, by path, with the checkpoint's weights and residuals in place of those that are to be."""
    made = {after for _, after in change.weights.values()} | {*change.counts}
    found = {path: leaf for path, leaf in leaves.items() if path not in made}
    for path, (before, _) in change.weights.items():
        leaf = leaves[path]
        found[path] = _as(manifest.leaves[path], leaf)
        if before:
            found[before] = _as(manifest.leaves[before], leaf)
    return found


def without_counts(manifest: Manifest, types: Mapping[str, str]) -> dict[str, Leaf]:
    """The checkpoint's leaves, without the counts of roundings that the wanted tree has not."""
    gone = tuple(f"{path}.count" for path in states(manifest) if types.get(path) != ROUNDED)
    return {path: leaf for path, leaf in manifest.leaves.items() if not (gone and path.startswith(gone))}


def without_states(types: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """The classes of a tree's inner nodes, without those of roundings: what is in them is compared by itself.

    "nearest" is an empty state at the end of a chain, which may not be there.
    """
    gone = tuple(path for tree in (types, other) for path, name in tree.items() if name == ROUNDED)
    ends = {path for path, name in types.items() if name == EMPTY and path not in other}
    return {path: name for path, name in types.items() if path not in ends and not (gone and path.startswith(gone))}


def _numbers(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """An abstract array, of no numbers where that is not one."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype_of(leaf.dtype) or jnp.bool_)


def _as(saved: Leaf, weight: Any) -> Any:
    """An array of a weight or its residual as it was saved, where the weight is to be."""
    sharding = getattr(weight, "sharding", None)
    if isinstance(sharding, NamedSharding) and saved.shape != weight.shape:
        sharding = fitted(sharding, weight.shape, saved.shape)
    return retyped(weight, saved.shape, dtype_of(saved.dtype), sharding)
