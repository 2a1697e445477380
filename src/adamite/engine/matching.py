"""Trees that must have the same leaves. What differs is named by its path."""

import operator
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import keystr

from adamite.numerics import is_none
from adamite.paths import leaves_with_path


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array or a number; AttributeError for anything else."""
    return () if isinstance(leaf, (int, float, complex)) else leaf.shape


def same_rank(shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
    """Whether two arrays have as many axes."""
    return len(shape) == len(leaf_shape)


def counterparts(
    updates: Any,
    tree: Any,
    name: str,
    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool] = operator.eq,
) -> list[Any]:
    """What stands in `tree` where `updates` has its leaves, of which None is one.

    Args:
        updates: tree of gradients.
        tree: the tree to match.
        name: what `tree` is called in an error.
        fits: whether a counterpart's shape goes with a leaf's.

    Raises:
        ValueError: the two differ in structure or in a shape, which broadcasting would hide; names the first path.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    try:
        found = structure.flatten_up_to(tree)
        shapes = [None if x is None else shape_of(x) for x in found]
    except (ValueError, AttributeError):
        raise ValueError(f"updates and {name} differ in structure: {_difference(updates, tree, name)}") from None
    for index, (leaf, theirs) in enumerate(zip(leaves, shapes, strict=True)):
        if leaf is not None and (theirs is None or not fits(theirs, shape_of(leaf))):
            where = keystr(leaves_with_path(updates, is_leaf=is_none)[index][0])
            what = "is None" if theirs is None else f"has shape {theirs}"
            raise ValueError(f"updates{where} has shape {shape_of(leaf)}, but {name}{where} {what}")
    return found


def _difference(updates: Any, tree: Any, name: str) -> str:
    ours = [path for path, _ in leaves_with_path(updates, is_leaf=is_none)]
    theirs = [path for path, _ in leaves_with_path(tree, is_leaf=is_none)]
    begun = {path[:n] for path in theirs for n in range(len(path) + 1)}
    for path in ours:
        if path not in begun:
            return f"updates{keystr(path)} has no counterpart in {name}"
    for path in theirs:
        if not any(path[:n] in set(ours) for n in range(len(path) + 1)):
            return f"{name}{keystr(path)} has no counterpart in updates"
    return f"{jax.tree.structure(updates)!s:.200} is not {jax.tree.structure(tree)!s:.200}"
