"""What an optimizer's state weighs beside weights and gradients, before anything is allocated.

Only shapes and dtypes are computed. What a step needs on its way is not counted.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jax.tree_util import keystr

from adamite import checks
from adamite.convert import UNSIGNED
from adamite.core.optimizer import engines_of
from adamite.core.ownership import Owned
from adamite.paths import leaves_with_path
from adamite.sharding.layout import of_params, of_state
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
    engine: str = ""
    """What takes its step: "xla", "pallas" or "native"; "" if it was not asked for."""
    why_xla: str = ""
    """Why it is XLA."""


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
        with_engines = any(leaf.engine for leaf in self.leaves)
        rows = [[*HEAD, *(["engine", "why XLA"] if with_engines else [])], *map(_row, alike.values())]
        rows.append(["", "other", "", "", "", "", "", f"{self.other:,}", ""])
        rows.append([f"{len(self.leaves)}", "total", "", "", "", *(f"{n:,}" for n in self.bytes), ""])
        each = [f"{n / max(self.parameters, 1):.2f}" for n in self.bytes]
        rows.append(["", "per parameter", "", "", "", *each, ""])
        share = f", {self.per_device.total:,} on each of {self.devices} devices" if self.devices > 1 else ""
        together = f"{self.bytes.total:,} bytes together{share}, {self.bytes_per_parameter:.2f} per parameter"
        undivided = [leaf.path for leaf in self.leaves if 0 < leaf.bytes.state == leaf.per_device.state]
        if self.devices == 1 or len(undivided) in (0, len(self.leaves)):
            return f"{_aligned(rows)}\n{together}"
        more = f" and {len(undivided) - 5} more" if len(undivided) > 5 else ""
        return f"{_aligned(rows)}\n{together}\nwhole on each device: the state of {', '.join(undivided[:5])}{more}"


HEAD = ["count", "parameter", "shape", "dtype", "moments", "weights", "gradients", "state", "not quantized"]
TEXT = (1, 2, 3, 4, 8, 9, 10)


def memory_report(
    tx: optax.GradientTransformation, params: Any, *, shardings: Any = None, engine: str | None = None
) -> MemoryReport:
    """What weights, gradients and optimizer state weigh, leaf by leaf. Nothing is allocated.

    Args:
        tx: any gradient transformation, of adamite or of optax.
        params: tree of arrays, or of anything with a ``shape`` and a ``dtype`` (`jax.eval_shape` gives such a tree).
        shardings: tree of `jax.sharding.Sharding`, or a prefix of one. None: those of `params` that are of a
            mesh; else one device. Arrays of the state that have the shape of their parameter are sharded as it is,
            others of its rank (scales of blocks, averages over axes) where that divides them, the rest is replicated.
        engine: say, too, what takes the step of each leaf in a jitted ``tx.step`` with this `engine`, in this process.

    Returns:
        The report. Its bytes of state are exactly those of ``tx.init(params)``. Gradients are taken to have the
        weights' dtypes; integers have none.

    Raises:
        TypeError: `tx` is no gradient transformation; a leaf of `params` has no shape and dtype; `shardings` holds
            something else.
        ValueError: `shardings` has another structure than `params`, or does not divide a leaf; `engine` is unknown.

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
    checks.transformation("tx", tx)
    leaves, structure = leaves_with_path(checks.abstract(params, "params")), jax.tree.structure(params)
    abstract = [leaf for _, leaf in leaves]
    found = of_params(params, shardings, "shardings")
    state = jax.eval_shape(tx.init, structure.unflatten(abstract))
    stored: list[list[tuple[Owned, Sharding | None]]] = [[] for _ in leaves]
    other = 0
    kept = of_state(tx, state, abstract, structure, found)
    for array, sharding in kept:
        if array.owner is None:
            other += _nbytes(array.array)
        else:
            stored[array.owner].append((array, sharding))
    paths = [f"params{keystr(path)}" for path, _ in leaves]
    devices = max((sharding.num_devices for sharding in found if sharding is not None), default=1)
    report = MemoryReport(tuple(map(_leaf_memory, paths, abstract, found, stored)), other, devices)
    if engine is None:
        return report
    # Types show shardings on Explicit axes only.
    laid = structure.unflatten(map(_sharded, abstract, found))
    laid_state = jax.tree.structure(state).unflatten(_sharded(array.array, sharding) for array, sharding in kept)
    choices = engines_of(tx, laid_state, laid, engine)
    told = [leaf._replace(engine=e, why_xla=why) for leaf, (e, why) in zip(report.leaves, choices, strict=True)]
    return dataclasses.replace(report, leaves=tuple(told))


def _sharded(x: Any, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _leaf_memory(
    path: str, leaf: Any, sharding: Sharding | None, stored: Sequence[tuple[Owned, Sharding | None]]
) -> LeafMemory:
    """The row of one parameter."""
    moments = ", ".join(dict.fromkeys(kept for kept in (_kept(array) for array, _ in stored) if kept))
    as_it_is = any(_in_blocks(array) and jnp.issubdtype(array.array.dtype, jnp.inexact) for array, _ in stored)
    why = (SMALL if leaf.size < Blockwise.smallest else CHOSEN) if as_it_is else ""
    weights = [(leaf, sharding)]
    gradients = weights if jnp.issubdtype(leaf.dtype, jnp.inexact) else []
    state = [(array.array, sharding) for array, sharding in stored]
    whole, share = (
        Bytes(
            *(
                sum(_nbytes(x, where if shared else None) for x, where in arrays)
                for arrays in (weights, gradients, state)
            )
        )
        for shared in (False, True)
    )
    return LeafMemory(path, leaf.shape, leaf.dtype.name, moments, why, whole, share)


def _in_blocks(array: Owned) -> bool:
    """Whether it is codes, or stands for them."""
    return array.path[-1:] == ("codes",)


def _kept(array: Owned) -> str:
    """How it keeps a moment; "" if it is none."""
    moment = "".join(array.path[-2:-1] if _in_blocks(array) else array.path[-1:])
    if moment not in UNSIGNED:
        return ""
    dtype: str = array.array.dtype.name
    return {"uint8": "int8", "int8": "float8" if UNSIGNED[moment] else "int8"}.get(dtype, dtype)


def _nbytes(x: Any, sharding: Sharding | None = None) -> int:
    """Of an array; or of what one device has of it."""
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _sum(parts: Iterable[Bytes]) -> Bytes:
    return Bytes(*map(sum, zip(*parts, strict=True)))


def _row(leaves: Sequence[LeafMemory]) -> list[str]:
    """Of leaves that differ in their paths only."""
    first = leaves[0]
    shape = " x ".join(map(str, first.shape))
    numbers = [f"{n:,}" for n in _sum(leaf.bytes for leaf in leaves)]
    kept = [f"{len(leaves)}", first.path.removeprefix("params"), shape, first.dtype, first.moments, *numbers, first.why]
    return [*kept, first.engine, first.why_xla] if first.engine else kept


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text to the left, of numbers to the right; short rows are filled up."""
    rows = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in TEXT else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
