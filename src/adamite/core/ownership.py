"""Which parameter an array of an optimizer's state belongs to, for any transformation: of optax, of adamite, wrapped.

An array belongs to a parameter where it stands in a tree of the parameters' structure, of which `optax.masked` and
`optax.partition` may have left something out, and which may have None in place of a parameter. Step counts and the like
belong to none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path


class Owned(NamedTuple):
    """An array of the state."""

    array: Any
    path: tuple[str, ...]
    """The names of the fields that it stands in."""
    owner: int | None
    """The number of its parameter; None: it belongs to no single one."""


def owned(state: Any, structure: Any) -> list[Owned]:
    """All arrays of the state of an optimizer for parameters of this structure, in the order of `jax.tree.leaves`."""
    places = structure.unflatten(range(structure.num_leaves))
    nodes, _ = tree_flatten_with_path(state, is_leaf=lambda node: belonging(node, places) is not None)
    found = []
    for path, node in nodes:
        names = tuple(key.name for key in path if isinstance(key, GetAttrKey))
        pairs = None if _is_count(node) else belonging(node, places)
        found += [Owned(node, names, None)] if pairs is None else [Owned(x, names, number) for number, x in pairs]
    return found


def belonging(node: Any, places: Any) -> list[tuple[int, Any]] | None:
    """The arrays of a tree that has the structure of `places`, each with the number of its place; None for others.

    Something may be left out of the tree, see above.
    """
    arrays, structure = jax.tree.flatten(node, is_leaf=is_absent)
    try:
        numbers = structure.flatten_up_to(places)
    except (TypeError, ValueError):
        return None
    pairs = [(n, x) for n, x in zip(numbers, arrays, strict=True) if not is_absent(x)]
    return pairs if all(isinstance(n, int) for n, _ in pairs) else None


def is_absent(node: Any) -> bool:
    """Whether it holds the place of an array that is not there."""
    return node is None or isinstance(node, optax.MaskedNode)


def _is_count(node: Any) -> bool:
    """Whether it is a whole number or a flag, which belongs to none even where the parameters are one array."""
    return getattr(node, "shape", None) == () and not jnp.issubdtype(node.dtype, jnp.inexact)
