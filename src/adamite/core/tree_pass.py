"""Running parts over a tree, leaf by leaf in one pass: a large leaf slice by slice (see `slices`), or in a kernel.

An update ends with the update of each leaf. A whole step ends with its weights, so that an engine can do all of it at
once: such leaves go to `adamite.engines`, the others are updated as ever.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamite import checks, engines
from adamite.core.matching import counterparts
from adamite.core.optimizer import Optimizer, moved
from adamite.core.part import Part
from adamite.core.placement import settle
from adamite.engines import Fused, Leaf
from adamite.engines.products import round_products
from adamite.engines.slices import cut, sweep
from adamite.numerics import as_array, cast, is_none, is_traced, update_dtype, wide_dtype, widen
from adamite.random_bits import element_index, fold, random_bits

SLICED = 2**12
"""Smaller leaves are stepped whole."""

EAGER_STEPS = 4
"""Programs of eager steps by kernels, at most. A schedule that returns Python numbers needs one for each number."""


class Leafwise(Optimizer):
    """A gradient transformation that can be part of one pass."""

    part: Part | None = None


def leafwise(part: Part) -> Leafwise:
    """The gradient transformation that runs `part`. Updates have the dtypes of `numerics.update_dtype`."""
    run = Pass(part)

    def init(params: optax.Params) -> Any:
        return settle(part.init(params), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        return run.update(updates, state, params)

    tx = Leafwise(init, update)
    tx.part = part
    tx.take = lambda grads, state, params, engine, _: run.step(grads, state, params, engine, like=grads)
    return tx


class Row(NamedTuple):
    """What stands at one leaf of the updates."""

    g: Any
    p: Any
    stored: Any


class Pass:
    """A part, run over a tree."""

    def __init__(self, part: Part, *, rounded: bool = True) -> None:
        """Of `part`; with updates that are rounded once, to `numerics.update_dtype`, or not below float32."""
        self.part = part
        self.rounded = rounded and part.weights is None
        self.update_leaf = _placed(self._update_leaf) if part.in_slices else self._update_leaf
        self.fused = Fused(self._step_tile, part.block)
        self.eager_steps: dict[Any, Callable[[list[jax.Array]], Any]] = {}

    def __reduce__(self) -> Any:
        """It is sent to another process without what was compiled in this one."""
        return _pass, (self.part, self.rounded)

    @functools.cached_property
    def traced_once(self) -> Callable[..., Any]:
        """`update_leaf`, traced once for all leaves of a shape."""
        return jax.jit(self.update_leaf)

    @functools.cached_property
    def constant(self) -> bool:
        """Whether the part is the same at each step, so that what is compiled for it is used again."""
        return not _closes_over_arrays(self.part)

    def update(self, updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[optax.Updates, Any]:
        """``(updates, state)``."""
        scalars, rows, structure = self._opened(updates, state, params)
        results = self._updated(scalars, dict(enumerate(rows)))
        return self._closed(state, structure, [results[number] for number in range(len(rows))])

    def step(
        self, updates: optax.Updates, state: Any, params: optax.Params, engine: str, like: optax.Updates
    ) -> tuple[optax.Params, Any]:
        """``(params, state)``: each leaf by an engine that can take it. Updates are rounded as the leaves of `like`."""
        scalars, rows, structure = self._opened(updates, state, params)
        results: dict[int, Any] = {number: (row.p, row.stored) for number, row in enumerate(rows)}
        by_engine: dict[str, list[Leaf]] = {}
        for number, (row, g) in enumerate(zip(rows, jax.tree.leaves(like, is_leaf=is_none), strict=True)):
            if row.g is not None:
                leaf = Leaf(number, as_array(row.g), as_array(row.p), row.stored, update_dtype(g, row.p))
                by_engine.setdefault(
                    engines.choose(engine, self.fused, scalars, leaf, self.part.elementwise), []
                ).append(leaf)
        by_xla = {leaf.number: leaf for leaf in by_engine.pop("xla", ())}
        for number, (u, stored) in self._updated(scalars, {number: rows[number] for number in by_xla}).items():
            results[number] = moved(rows[number].p, self._rounded(u, by_xla[number].dtype)), stored
        for name, leaves in by_engine.items():
            done = self._taken(name, scalars, leaves)
            results |= {leaf.number: result for leaf, result in zip(leaves, done, strict=True)}
        return self._closed(state, structure, [results[number] for number in range(len(rows))])

    def _opened(self, updates: Any, state: Any, params: Any) -> tuple[Any, list[Row], Any]:
        scalars, columns = self.part.begin(updates, state, params)
        checks.differentiable(updates, "updates")
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        weights = [None] * len(leaves) if params is None else counterparts(updates, params, "params")
        return scalars, [Row(*row) for row in zip(leaves, weights, columns, strict=True)], structure

    def _closed(self, state: Any, structure: Any, results: Sequence[Any]) -> tuple[Any, Any]:
        new = self.part.end(state, [stored for _, stored in results], structure)
        return structure.unflatten([first for first, _ in results]), new

    def _updated(self, scalars: Any, rows: dict[int, Row]) -> dict[int, Any]:
        """The update of each leaf by its number, and what the state then holds for it."""
        whole = [row.g for row in rows.values()]
        worth_it = _worth_tracing_once(whole) if _traced(rows) else self.constant
        one = self.traced_once if self.part.in_slices or worth_it else self.update_leaf
        turn, results = _first_turn(scalars) if self.part.in_slices else None, {}
        for number, (g, p, stored) in rows.items():
            if g is not None:
                turn, g, stored = one(scalars, number, turn, as_array(g), None if p is None else as_array(p), stored)
            results[number] = g, stored
        return results

    def _taken(self, name: str, scalars: Any, leaves: list[Leaf]) -> list[tuple[jax.Array, Any]]:
        """The weights of each leaf by a kernel, and what the state then holds for it. Eager steps are jitted."""
        traced = _traced((scalars, leaves))
        if traced or not self.constant or any(leaf.p.sharding.num_devices > 1 for leaf in leaves):
            return engines.take(name, self.fused, scalars, leaves)  # jit would hide how a leaf is spread
        arrays, put = engines.split((scalars, leaves))
        values, structure = jax.tree.flatten((scalars, leaves))
        key = name, structure, tuple(x for x in values if not isinstance(x, jax.Array))
        if key not in self.eager_steps:
            if len(self.eager_steps) == EAGER_STEPS:
                return engines.take(name, self.fused, scalars, leaves)
            self.eager_steps[key] = jax.jit(lambda arrays: engines.take(name, self.fused, *put(arrays)))
        return self.eager_steps[key](arrays)

    def _update_leaf(self, scalars: Any, number: Any, turn: Any, g: Any, p: Any, stored: Any) -> tuple[Any, Any, Any]:
        def step(read: Any, written: Any, index: Callable[[], jax.Array]) -> tuple[jax.Array, Any]:
            g, p = read
            one = self._step_alike if self.part.few_bits(stored) else self._step
            u, new = one(scalars, number, index, g, p, written)
            return cast(u, dtype), new

        dtype = update_dtype(g, p)
        dtype = dtype if self.rounded else wide_dtype(dtype)
        if not self.part.in_slices or g.size < SLICED:
            return turn, *step((g, p), stored, lambda: element_index(g.shape))
        blank = jnp.full_like(g, turn, dtype)
        return sweep(cut(g.shape, self.part.block, jax.device_count()), step, turn, (g, p), stored, blank)

    def _step_tile(
        self, scalars: Any, number: Any, index: Any, g: Any, p: Any, stored: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        u, new = self._step(scalars, number, index, g, p, stored)
        return moved(p, self._rounded(u, dtype)), new

    def _rounded(self, u: jax.Array, dtype: Any) -> jax.Array:
        """An update as it is added to weights."""
        return u if self.part.weights else cast(u, dtype)

    def _step_alike(self, scalars: Any, number: Any, index: Any, *leaf: Any) -> tuple[jax.Array, Any]:
        """As `_step`, with the same bits in every program of XLA's."""
        step = round_products(lambda scalars, number, index, *leaf: self._step(scalars, number, lambda: index, *leaf))
        return step(scalars, number, index(), *leaf)

    def _step(self, scalars: Any, number: Any, index: Any, g: Any, p: Any, stored: Any) -> tuple[jax.Array, Any]:
        p = widen(p) if p is not None and self.part.weights is None else p
        return self.part.step(scalars, widen(g), p, stored, lambda key: random_bits(fold(key, number), index()))


def _placed(one: Callable[..., Any]) -> Callable[..., Any]:
    """`one` for explicit meshes, too, whose types know no blocks: results are sharded as what they replace."""

    def placed(scalars: Any, number: Any, turn: Any, g: Any, p: Any, stored: Any) -> Any:
        mesh = jax.typeof(g).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return one(scalars, number, turn, g, p, stored)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (g, stored))
        auto: Any = jax.sharding.auto_axes(one, out_sharding=(NamedSharding(mesh, PartitionSpec()), *shardings))
        return auto(scalars, number, turn, g, p, stored)

    return placed


def _first_turn(scalars: Any) -> jax.Array:
    """A number >= 0 that the compiler does not know: part of any number that is computed at each step."""
    computed = [x for x in jax.tree.leaves(scalars) if isinstance(x, jax.Array)]
    return computed[0].astype(jnp.int32) & 0x7FFFFFFF if computed else jnp.int32(0)


def _pass(part: Part, rounded: bool) -> Pass:
    return Pass(part, rounded=rounded)


def _traced(tree: Any) -> bool:
    return any(is_traced(x) for x in jax.tree.leaves(tree))


def _closes_over_arrays(value: Any, seen: set[int] | None = None) -> bool:
    """Whether a function, or one in a tuple or dict, refers to an array of its surroundings.

    `optax.inject_hyperparams` builds such a transformation anew for each step. Compiled, it would be so at each step.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return any(_closes_over_arrays(x, seen) for x in value)
    cells = getattr(value, "__closure__", None) or ()
    return isinstance(value, jax.Array) or any(_closes_over_arrays(x.cell_contents, seen) for x in cells)


def _worth_tracing_once(leaves: list[Any]) -> bool:
    """Whether a jitted step, which is traced once a shape, spares tracing: where a shape recurs under jit."""
    leaves = [g for g in leaves if g is not None]
    return any(is_traced(g) for g in leaves) and len({jnp.shape(g) for g in leaves}) < len(leaves)
