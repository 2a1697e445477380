"""What arrays are called elsewhere, and how they lie there.

A mapping gives the name there of each array of ours, and axes where they lie otherwise:

    {"dense.kernel": ("dense.weight", (1, 0)), "dense.bias": "dense.bias"}

Ours is called by its path, ``jax.tree_util.keystr(path, simple=True, separator=".")``. The axes are those of
``ours = jnp.transpose(theirs, axes)``. Parameters of torch's optimizers may have no name but a number; then the mapping
gives that. Without a mapping the names there are ours.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from adamite import checks
from adamite.paths import leaves_with_path

Name = str | int
Names = Mapping[str, Name | tuple[Name, tuple[int, ...]]]

WEIGHTS = {"embedding", "scale"}
"""What Flax calls so is torch's ``weight``, as it lies; kernels are, too, transposed."""


class Place(NamedTuple):
    """An array of ours and what it is called elsewhere."""

    path: str
    leaf: jax.ShapeDtypeStruct
    name: Name
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return tuple(self.leaf.shape[axis] for axis in np.argsort(self.axes))

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """What is there, as it lies here."""
        return np.transpose(theirs, self.axes)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """What is here, as it lies there: in C order, and a copy, for torch writes into what it is given."""
        return np.array(np.transpose(ours, np.argsort(self.axes)), order="C")


def path_name(path: jax.tree_util.KeyPath) -> str:
    """What an array of ours is called."""
    return keystr(path, simple=True, separator=".")


def places(params: Any, mapping: Names | None, name: str = "params", *, optional: Collection[str] = ()) -> list[Place]:
    """Each array of `params`, in the mapping's order, and where it is elsewhere.

    Args:
        params: tree of arrays, or of anything with a shape and a dtype.
        mapping: see the top of this file.
        name: what `params` is called in an error.
        optional: the paths of arrays that need no entry; without one they are left out.

    Raises:
        ValueError: an array has no entry, or an entry no array; two have one name; axes are no permutation of an
            array's axes.
        TypeError: the mapping, or something in it, is the wrong kind of thing.

    Example:
        >>> import jax.numpy as jnp
        >>> [place] = places({"kernel": jnp.ones((2, 3))}, {"kernel": ("weight", (1, 0))})
        >>> place.name, place.shape
        ('weight', (3, 2))
    """
    leaves: dict[str, Any] = {}
    for path, leaf in leaves_with_path(checks.abstract(params, name)):
        if path_name(path) in leaves:
            raise ValueError(f"{name} must have one array of each name, got two called {path_name(path)!r}")
        leaves[path_name(path)] = leaf
    if mapping is None:
        mapping = {path: path for path in leaves}
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping must be None or a dict, got {mapping!r:.80} of type {type(mapping).__name__}")
    for path in mapping:
        if path not in leaves:
            raise ValueError(f"mapping has an entry {path!r}, but {name} has no such array, only {some(leaves)}")
    for path in leaves:
        if path not in mapping and path not in optional:
            raise ValueError(f"mapping must have an entry for each array of {name}, got none for {path!r}")
    found = [_place(path, leaves[path], there) for path, there in mapping.items()]
    taken: dict[Name, str] = {}
    for place in found:
        if place.name in taken:
            raise ValueError(f"mapping gives {taken[place.name]!r} and {place.path!r} one name, {place.name!r}")
        taken[place.name] = place.path
    return found


def flax_names(params: Any) -> dict[str, Name | tuple[Name, tuple[int, ...]]]:
    """The mapping from the names of Flax, Linen's or NNX's, to those of torch.

    A ``kernel`` of two dimensions is a ``weight``, transposed; one of three to five is that of a convolution, (spatial
    ..., in, out) here and (out, in, spatial ...) there. ``embedding`` and ``scale`` are a ``weight``, too. All other
    names stay, and so do those of the modules.

    Only names and shapes are looked at. Give a mapping of your own, or replace entries of this one, where they mislead:
    attention's kernels are of three dimensions and look like those of convolutions; transposed convolutions lie
    otherwise in torch; the modules' names may differ.

    Args:
        params: tree of arrays, or of anything with a shape and a dtype; `flax.nnx.state` of a model or Linen's dicts.

    Returns:
        A mapping as `from_torch` and `save_weights` take it, in the tree's order.

    Example:
        >>> import jax.numpy as jnp
        >>> flax_names({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        {'dense.bias': 'dense.bias', 'dense.kernel': ('dense.weight', (1, 0))}
    """
    return {place.path: _of_flax(place) for place in places(params, None)}


def _of_flax(place: Place) -> Name | tuple[Name, tuple[int, ...]]:
    *modules, last = place.path.split(".")
    rank = len(place.leaf.shape)
    weight = ".".join([*modules, "weight"])
    if last == "kernel" and 2 <= rank <= 5:
        return weight, (*range(2, rank), 1, 0)
    return weight if last in WEIGHTS else ".".join([*modules, last])


def _place(path: str, leaf: Any, there: Any) -> Place:
    own = tuple(range(len(leaf.shape)))
    name, axes = there if isinstance(there, tuple) and len(there) == 2 else (there, own)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise TypeError(f"mapping[{path!r}] must be a name, a number or a pair of one and axes, got {there!r:.80}")
    if not isinstance(axes, (tuple, list)) or sorted(axes, key=str) != sorted(own, key=str):
        raise ValueError(f"mapping[{path!r}] must have axes that are a permutation of {own}, got {axes!r:.80}")
    return Place(path, leaf, name, tuple(axes))


def some(names: Any) -> str:
    """The first names, for an error."""
    return ", ".join(map(repr, list(names)[:5])) + (", ..." if len(names) > 5 else "")
