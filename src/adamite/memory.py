"""What an optimizer's state weighs beside weights and gradients, before anything is allocated.

Only shapes and dtypes are computed. An array of the state belongs to a parameter where it stands in a tree of the
parameters' structure, of which `optax.masked` and `optax.partition` may have left something out. Step counts and the
like belong to none. What a step needs on its way is not counted.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, Sharding
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from adamite.convert import UNSIGNED
from adamite.engine.placement import fitted
from adamite.numerics import as_array
from adamite.storage import Blockwise

SMALL = f"fewer than {Blockwise.smallest:,} elements"
CHOSEN = "as moments= says"


class Bytes(NamedTuple):
    """How many of each."""

    weights: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """Of all three."""
        return sum(self)


class LeafMemory(NamedTuple):
    """What belongs to one parameter."""

    path: str
    """As errors name it: ``params['w']``."""
    shape: tuple[int, ...]
    dtype: str
    moments: str
    """How its moments are kept: "float32", "bfloat16", "int8"; "int8, float8" where they differ; "" without any."""
    why: str
    """Why its moments are not quantized, though the optimizer quantizes; else ""."""
    bytes: Bytes
    """On all devices together, each element counted once."""
    per_device: Bytes


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What `memory_report` found. As a string it is a table, in which leaves that are alike share a row."""

    leaves: tuple[LeafMemory, ...]
    other: int
    """Bytes of state that belong to no single parameter, as step counts do. Each device has all of them."""
    devices: int

    @property
    def parameters(self) -> int:
        """How many numbers the parameters are."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    @property
    def bytes(self) -> Bytes:
        """On all devices together, each element counted once."""
        return _sum([Bytes(0, 0, self.other), *(leaf.bytes for leaf in self.leaves)])

    @property
    def per_device(self) -> Bytes:
        """On each device."""
        return _sum([Bytes(0, 0, self.other), *(leaf.per_device for leaf in self.leaves)])

    @property
    def bytes_per_parameter(self) -> float:
        """Of weights, gradients and state together."""
        return self.bytes.total / max(self.parameters, 1)

    def __str__(self) -> str:
        """The table: leaves, then totals in bytes, on each device if there are several, and for each parameter."""
        alike: dict[Any, list[LeafMemory]] = {}
        for leaf in self.leaves:
            alike.setdefault((leaf.shape, *leaf[2:]), []).append(leaf)
        rows = [HEAD, *(_row(leaves) for leaves in alike.values())]
        rows.append(["", "other", "", "", "", "", "", f"{self.other:,}", ""])
        rows.append([f"{len(self.leaves)}", "total", "", "", "", *(f"{n:,}" for n in self.bytes), ""])
        each = [f"{n / max(self.parameters, 1):.2f}" for n in self.bytes]
        rows.append(["", "per parameter", "", "", "", *each, ""])
        share = f", {self.per_device.total:,} on each of {self.devices} devices" if self.devices > 1 else ""
        together = f"{self.bytes.total:,} bytes together{share}, {self.bytes_per_parameter:.2f} per parameter"
        return f"{_aligned(rows)}\n{together}"


HEAD = ["count", "parameter", "shape", "dtype", "moments", "weights", "gradients", "state", "not quantized"]
TEXT = (1, 2, 3, 4, 8)


def memory_report(tx: optax.GradientTransformation, params: Any, *, shardings: Any = None) -> MemoryReport:
    """What weights, gradients and optimizer state weigh, leaf by leaf. Nothing is allocated.

    Args:
        tx: any gradient transformation, of adamite or of optax.
        params: tree of arrays, or of anything with a ``shape`` and a ``dtype`` (`jax.eval_shape` gives such a tree).
        shardings: tree of `jax.sharding.Sharding`, or a prefix of one. None: those of `params` that are of a
            mesh; else one device. Arrays of the state that have the shape of their parameter are sharded as it is,
            others of its rank (scales of blocks, averages over axes) where that divides them, the rest is replicated.

    Returns:
        The report. Its bytes of state are exactly those of ``tx.init(params)``. Gradients are taken to have the
        weights' dtypes; integers have none.

    Raises:
        TypeError: `tx` is no gradient transformation; a leaf of `params` has no shape and dtype; `shardings` holds
            something else.
        ValueError: `shardings` has another structure than `params`, or does not divide a leaf.

    Example:
        Eight bits of residual, two moments of eight bits, and weights and gradients in bfloat16 are seven bytes:

        >>> from adamite import adamw
        >>> params = jax.eval_shape(lambda: {"b": jnp.zeros(9), "w": jnp.zeros((16, 256))})
        >>> params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
        >>> print(memory_report(adamw(1e-3, moments="int8", rounding="residual8"), params))
        count  parameter      shape     dtype     moments  weights  gradients   state  not quantized
            1  ['b']          9         bfloat16  float32       18         18      89  fewer than 4,096 elements
            1  ['w']          16 x 256  bfloat16  int8       8,192      8,192  12,416
               other                                                                8
            2  total                                         8,210      8,210  12,513
               per parameter                                  2.00       2.00    3.05
        28,933 bytes together, 7.05 per parameter
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be a gradient transformation, got {tx!r:.80} of type {type(tx).__name__}")
    leaves, structure = tree_flatten_with_path(params)
    paths = [f"params{keystr(path)}" for path, _ in leaves]
    abstract = [_abstract(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    found = _shardings(shardings, params, paths, abstract)
    owned, other = _owned(jax.eval_shape(tx.init, structure.unflatten(abstract)), structure)
    devices = max((sharding.num_devices for sharding in found if sharding is not None), default=1)
    return MemoryReport(tuple(map(_leaf_memory, paths, abstract, found, owned)), sum(map(_nbytes, other)), devices)


class _Stored(NamedTuple):
    """An array of the state that belongs to a parameter."""

    array: Any
    path: tuple[str, ...]
    """The names of the fields that its tree stands in."""

    @property
    def in_blocks(self) -> bool:
        """Whether it is codes, or stands for them."""
        return self.path[-1:] == ("codes",)

    @property
    def kept(self) -> str:
        """How it keeps a moment; "" if it is none."""
        moment = "".join(self.path[-2:-1] if self.in_blocks else self.path[-1:])
        if moment not in UNSIGNED:
            return ""
        dtype: str = self.array.dtype.name
        return {"uint8": "int8", "int8": "float8" if UNSIGNED[moment] else "int8"}.get(dtype, dtype)


def _owned(state: Any, structure: Any) -> tuple[list[list[_Stored]], list[Any]]:
    """The state's arrays for each parameter, and those that belong to none."""
    places = structure.unflatten(range(structure.num_leaves))
    owned: list[list[_Stored]] = [[] for _ in range(structure.num_leaves)]
    other = []
    nodes, _ = tree_flatten_with_path(state, is_leaf=lambda node: _counterparts(node, places) is not None)
    for path, node in nodes:
        names = tuple(key.name for key in path if isinstance(key, GetAttrKey))
        found = _counterparts(node, places)
        if found is None or _is_count(node):
            other.append(node)
        else:
            for number, array in found:
                owned[number].append(_Stored(array, names))
    return owned, other


def _counterparts(node: Any, places: Any) -> list[tuple[int, Any]] | None:
    """The arrays of a tree that has the structure of `places`, each with the number of its place; None for others."""
    arrays, structure = jax.tree.flatten(node, is_leaf=_is_masked)
    try:
        numbers = structure.flatten_up_to(places)
    except (TypeError, ValueError):
        return None
    pairs = [(n, x) for n, x in zip(numbers, arrays, strict=True) if not _is_masked(x)]
    return pairs if all(isinstance(n, int) for n, _ in pairs) else None


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_count(node: Any) -> bool:
    """Whether it is a whole number, which stands beside the moments even where the parameters are one array."""
    return getattr(node, "shape", None) == () and jnp.issubdtype(node.dtype, jnp.integer)


def _leaf_memory(path: str, leaf: Any, sharding: Sharding | None, stored: Sequence[_Stored]) -> LeafMemory:
    """The row of one parameter."""
    moments = ", ".join(dict.fromkeys(s.kept for s in stored if s.kept))
    as_it_is = any(s.in_blocks and jnp.issubdtype(s.array.dtype, jnp.inexact) for s in stored)
    why = (SMALL if leaf.size < Blockwise.smallest else CHOSEN) if as_it_is else ""
    gradient = [leaf] if jnp.issubdtype(leaf.dtype, jnp.inexact) else []
    whole, share = (
        Bytes(*(sum(nbytes(x) for x in arrays) for arrays in ([leaf], gradient, [s.array for s in stored])))
        for nbytes in (_nbytes, lambda x: _nbytes_on_one_device(x, leaf, sharding))
    )
    return LeafMemory(path, leaf.shape, leaf.dtype.name, moments, why, whole, share)


def _nbytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _nbytes_on_one_device(x: Any, leaf: Any, sharding: Sharding | None) -> int:
    """Of an array that belongs to a parameter of that sharding."""
    shape = x.shape
    if sharding is not None and shape == leaf.shape:
        shape = sharding.shard_shape(shape)
    elif isinstance(sharding, NamedSharding) and len(shape) == len(leaf.shape):
        shape = fitted(sharding, leaf.shape, shape).shard_shape(shape)
    return math.prod(shape) * x.dtype.itemsize


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """A parameter's shape and dtype."""
    if isinstance(leaf, (int, float, complex)):
        leaf = jax.eval_shape(as_array, leaf)
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(f"{path} must have a shape and a dtype, got {leaf!r:.80} of type {type(leaf).__name__}")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _shardings(shardings: Any, params: Any, paths: Sequence[str], abstract: Sequence[Any]) -> list[Sharding | None]:
    """That of each parameter; None: one device."""
    if shardings is None:
        own = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
        return [s if isinstance(s, NamedSharding) else None for s in own]
    try:
        found = jax.tree.leaves(jax.tree.broadcast(shardings, params))
    except ValueError as error:
        raise ValueError(f"shardings must have the structure of params or a prefix of it: {error}") from None
    for path, leaf, sharding in zip(paths, abstract, found, strict=True):
        if not isinstance(sharding, Sharding):
            raise TypeError(f"shardings must hold jax.sharding.Sharding, got {sharding!r:.80} for {path}")
        try:
            sharding.shard_shape(leaf.shape)
        except (IndexError, ValueError) as error:
            raise ValueError(f"shardings must divide {path} of shape {leaf.shape}: {error}") from None
    return found


def _sum(parts: Iterable[Bytes]) -> Bytes:
    return Bytes(*map(sum, zip(*parts, strict=True)))


def _row(leaves: Sequence[LeafMemory]) -> list[str]:
    """Of leaves that differ in their paths only."""
    first = leaves[0]
    shape = " x ".join(map(str, first.shape))
    numbers = [f"{n:,}" for n in _sum(leaf.bytes for leaf in leaves)]
    return [f"{len(leaves)}", first.path.removeprefix("params"), shape, first.dtype, first.moments, *numbers, first.why]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text to the left, of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in TEXT else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
