"""Trees that must have the same leaves. What differs is named by its path."""

import operator
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import KeyPath, keystr, tree_leaves_with_path

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
    *,
    ours: str = "updates",
) -> list[Any]:
    """What stands in `tree` where `updates` has its leaves, of which None is one: there, anything may stand in `tree`.

    Args:
        updates: tree of gradients.
        tree: the tree to match.
        name: what `tree` is called in an error.
        fits: whether a counterpart's shape goes with a leaf's.
        ours: what `updates` is called in an error.

    Raises:
        ValueError: the two differ in structure or in a shape, which broadcasting would hide; names the first path.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    try:
        found = structure.flatten_up_to(tree)
        shapes = [None if u is None or x is None else shape_of(x) for u, x in zip(leaves, found, strict=True)]
    except (ValueError, AttributeError):
        raise ValueError(f"{ours} and {name} differ in structure: {difference(updates, ours, tree, name)}") from None
    for index, (leaf, theirs) in enumerate(zip(leaves, shapes, strict=True)):
        if leaf is not None and (theirs is None or not fits(theirs, shape_of(leaf))):
            where = keystr(leaves_with_path(updates, is_leaf=is_none)[index][0])
            what = "is None" if theirs is None else f"has shape {theirs}"
            raise ValueError(f"{ours}{where} has shape {shape_of(leaf)}, but {name}{where} {what}")
    return found


def difference(tree: Any, name: str, other: Any, other_name: str, *, prefix: bool = False) -> str:
    """The first place in which two trees of different structure differ, in words.

    Args:
        tree: the one; None is a leaf of it.
        name: what it is called.
        other: the other one.
        other_name: what that is called.
        prefix: whether a leaf of the one may stand for all that is below it in the other.
    """
    return _first((tree, other), (name, other_name), (), prefix) or f"{name} and {other_name} are not of one structure"


def _first(trees: tuple[Any, Any], names: tuple[str, str], path: KeyPath, prefix: bool) -> str:
    """The first difference at a path or below; "" if there is none."""
    ours, theirs = map(_children, trees)
    if ours is None and (theirs is None or prefix):
        return ""
    if ours is not None and theirs is not None:
        for mine, others, name, other in ((ours, theirs, *names), (theirs, ours, *names[::-1])):
            for key in mine:
                if key not in others:
                    return f"{name}{keystr((*path, *key))} has no counterpart in {other}"
        for key, child in ours.items():
            if found := _first((child, theirs[key]), names, (*path, *key), prefix):
                return found
    here, there = (f"{name}{keystr(path)}" for name in names)
    kind, other_kind = map(_kind, trees)
    if kind != other_kind:
        return f"{here} is {kind}, and {there} is {other_kind}"
    same = jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    kind = type(trees[0]).__name__
    return "" if same else f"{here} and {there} are of one class, {kind}, and differ in their static fields"


def _kind(node: Any) -> str:
    if node is None:
        return "None"
    return "an array" if _children(node) is None and hasattr(node, "shape") else f"a {type(node).__name__}"


def _children(node: Any) -> dict[KeyPath, Any] | None:
    """What a node holds, by its keys; None: it is a leaf."""
    if node is None:
        return None
    children = tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return None if [path for path, _ in children] == [()] else dict(children)
