"""What differs between a checkpoint and what it is to be restored into; and which differences are meant.

Every difference has a name, which `allow` takes:

    optimizer.learning_rate     an argument of the optimizer; "optimizer" is all of them
    storage                     how moments are kept: they are converted, with the arguments that say how
    weights                     how weights are kept, their dtype and residuals: likewise
    dtype                       floating arrays in another dtype: they are cast
    mesh                        arrays cut otherwise, or on other devices, and what says so: `zero1`, `placed`
    tree[0]['head']             what is new at that place, has another shape, or is not there any more
    ['head']                    likewise, wherever paths have these keys: a parameter and its moments

All else (another class of state, integers of another dtype) cannot be allowed: it would be another run.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adamite import checks
from adamite.checkpoint.leaves import Leaf, is_floating
from adamite.checkpoint.places import is_place
from adamite.convert_weights import keys
from adamite.core import RoundingState
from adamite.core.rule_part import Counted
from adamite.storage import Quantized

KINDS = ("storage", "dtype", "mesh", "weights")
KEPT = {Quantized.__name__: "storage", Counted.__name__: "storage", RoundingState.__name__: "weights"}
"""Classes of a state that come with one kind of difference."""
SHOWN = 12

Described = tuple[Mapping[str, str], Mapping[str, Leaf]]
"""The classes of a tree's inner nodes and its leaves, by path."""


def names(allow: Any) -> set[str]:
    """The differences that are meant.

    Raises:
        ValueError: there is no such difference.
        TypeError: it is no string and holds none.
    """
    allowed = checks.strings("allow", allow)
    for name in allowed:
        if name not in KINDS and not f"{name}.".startswith("optimizer.") and not is_place(name):
            raise ValueError(
                f"allow must hold {', '.join(KINDS)}, optimizer.ARGUMENT or a place such as tree[0]['head'] "
                f"or ['head'], got {name!r:.80}"
            )
    return allowed


def of_trees(saved: Described, now: Described, weights: set[str], allowed: set[str], name: str) -> Iterator[str]:
    """Each difference that is not allowed, with its path, both values and the name that allows it.

    Args:
        saved: the tree that was saved.
        now: the tree that is wanted.
        weights: the paths of leaves that belong to no optimizer's state.
        allowed: what may differ.
        name: what errors call the tree.
    """
    types = saved[0], now[0]
    rounded = any(KEPT.get(kind) == "weights" for tree in types for kind in tree.values())
    for path in sorted(types[0].keys() | types[1].keys()):
        was, is_now = (tree.get(path, "nothing") for tree in types)
        if was != is_now and path not in saved[1] and path not in now[1]:
            yield f"{name}{path}: saved {was}, now {is_now} (allow {(_kind(types, path) or name + path)!r})"
    for path in sorted(saved[1].keys() | now[1].keys()):
        was, is_now = (tree[1].get(path) for tree in (saved, now))
        line = f"{name}{path}: saved {_words(was)}, now {_words(is_now)}"
        if was is None or is_now is None or was.shape != is_now.shape:
            yield f"{line} (allow {(_kind(types, path) or name + path)!r})"
        elif was.dtype != is_now.dtype:
            kind = _kind(types, path)
            if is_floating(was.dtype) and is_floating(is_now.dtype):
                kind = "weights" if rounded and path in weights else kind or "dtype"
            yield line + (f" (allow {kind!r})" if kind else "")
        elif "mesh" not in allowed and (was.grid, was.devices) != (is_now.grid, is_now.devices):
            yield f"{name}{path}: saved {_where(was)}, now {_where(is_now)} (allow 'mesh')"


def _kind(types: tuple[Mapping[str, str], Mapping[str, str]], path: str) -> str | None:
    """The kind of difference that explains one at a path, as a class above it tells; None if none does."""
    way = keys(path)
    for n in range(len(way), -1, -1):
        was, is_now = (tree.get("".join(way[:n])) for tree in types)
        kinds = {KEPT[kind] for kind in (was, is_now) if kind in KEPT}
        if "weights" in kinds or (kinds and was != is_now and None not in (was, is_now)):
            return kinds.pop()
    return None


def _words(leaf: Leaf | None) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _where(leaf: Leaf) -> str:
    if not leaf.devices:
        return "on the host"
    cut = " x ".join(map(str, leaf.grid)) if math.prod(leaf.grid) > 1 else "one"
    return f"in {cut} part{'s' * (cut != 'one')} on {leaf.devices} device{'s' * (leaf.devices > 1)}"
