"""Trees that must have the same leaves. What differs is named by its path."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from adamite.numerics import is_none


def counterparts(updates: Any, tree: Any, name: str) -> list[Any]:
    """What stands in `tree` where `updates` has its leaves, of which None is one.

    Raises:
        ValueError: the two have not the same structure; names the first path that only one of them has.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    try:
        found = structure.flatten_up_to(tree)
    except ValueError:
        raise ValueError(f"updates and {name} differ in structure: {_difference(updates, tree, name)}") from None
    for index, (leaf, other) in enumerate(zip(leaves, found, strict=True)):
        if other is None and leaf is not None:
            where = _path(updates, index)
            raise ValueError(f"updates{where} is an array, but {name}{where} is None")
    return found


def same_shapes(updates: Any, others: Iterable[Any], name: str) -> None:
    """Refuse a gradient whose counterpart has another shape: broadcasting would hide the mistake."""
    for index, (leaf, other) in enumerate(zip(jax.tree.leaves(updates, is_leaf=is_none), others, strict=True)):
        if leaf is not None and jnp.shape(leaf) != jnp.shape(other):
            where = _path(updates, index)
            raise ValueError(
                f"updates{where} has shape {jnp.shape(leaf)}, but {name}{where} has shape {jnp.shape(other)}"
            )


def _path(tree: Any, index: int) -> str:
    return keystr(tree_leaves_with_path(tree, is_leaf=is_none)[index][0])


def _difference(updates: Any, tree: Any, name: str) -> str:
    ours = [path for path, _ in tree_leaves_with_path(updates, is_leaf=is_none)]
    theirs = [path for path, _ in tree_leaves_with_path(tree, is_leaf=is_none)]
    begun = {path[:n] for path in theirs for n in range(len(path) + 1)}
    for path in ours:
        if path not in begun:
            return f"updates{keystr(path)} has no counterpart in {name}"
    for path in theirs:
        if not any(path[:n] in set(ours) for n in range(len(path) + 1)):
            return f"{name}{keystr(path)} has no counterpart in updates"
    return f"{jax.tree.structure(updates)!s:.200} is not {jax.tree.structure(tree)!s:.200}"
