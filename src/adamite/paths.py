"""The path of a leaf: the same in `init`, `update`, `step`, reports and checkpoints.

Flax wraps arrays in objects: NNX in a ``Variable``, Linen in a ``Partitioned``. `nnx.Optimizer` gives `init` the
variables, and `update` the arrays in them. So a path of ours leaves the wrapper out: it is ``['dense']['kernel']``, and
not ``['dense']['kernel'].value``. Trees without wrappers have the paths of `jax.tree_util`.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import KeyPath, tree_leaves_with_path

WRAPPERS = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
"""The classes that wrap arrays, with their modules. What is not imported has wrapped nothing."""

IsLeaf = Callable[[Any], bool] | None


def leaves_with_path(tree: Any, is_leaf: IsLeaf = None) -> list[tuple[KeyPath, Any]]:
    """`jax.tree_util.tree_leaves_with_path`, the paths without wrappers.

    Example:
        >>> leaves_with_path({"w": 1.0, "b": (2.0, None)})
        [((DictKey(key='b'), SequenceKey(idx=0)), 2.0), ((DictKey(key='w'),), 1.0)]
    """
    wrappers = _wrappers()
    if not wrappers:
        return tree_leaves_with_path(tree, is_leaf)
    found: list[tuple[KeyPath, Any]] = []

    def ends(x: Any) -> bool:
        return isinstance(x, wrappers) or (is_leaf is not None and is_leaf(x))

    for path, node in tree_leaves_with_path(tree, ends):
        inside = tree_leaves_with_path(node, is_leaf) if isinstance(node, wrappers) else [((), node)]
        found += [((*path, *below[1:]), leaf) for below, leaf in inside]
    return found


def map_with_path(function: Callable[[KeyPath, Any], Any], tree: Any, is_leaf: IsLeaf = None) -> Any:
    """`jax.tree_util.tree_map_with_path` of one tree, the paths without Flax's wrappers.

    `nnx.Optimizer` gives `init` variables and `update` the arrays in them. Labels for `optax.partition` and masks for
    `optax.masked` that are made with this function are the same for both.

    Args:
        function: ``function(path, leaf)``.
        tree: any tree.
        is_leaf: as `jax.tree.map` takes it.

    Returns:
        The results, in the structure of `tree`. Wrappers stay around them.

    Example:
        >>> from jax.tree_util import keystr
        >>> map_with_path(lambda path, _: keystr(path), {"w": 1.0, "b": 2.0})
        {'b': "['b']", 'w': "['w']"}
    """
    results = [function(path, leaf) for path, leaf in leaves_with_path(tree, is_leaf)]
    return jax.tree.structure(tree, is_leaf=is_leaf).unflatten(results)


def unwrapped(tree: Any) -> Any:
    """The tree with arrays in place of their wrappers."""
    wrappers = _wrappers()
    if not wrappers:
        return tree

    def content(node: Any) -> Any:
        inside = [node] if not isinstance(node, wrappers) else jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        return inside[0] if inside else None

    return jax.tree.map(content, tree, is_leaf=lambda x: isinstance(x, wrappers))


def _wrappers() -> tuple[type, ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in WRAPPERS)
    return tuple(x for x in found if isinstance(x, type))
