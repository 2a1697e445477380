"""Transformations that treat every element by itself, and how they run over a tree: one pass for a whole chain of them.

Adam, the weight decay behind it, the learning rate and the rounding of weights each change an element of the update by
what they know of that element alone. So they need not be done one after the other on the whole tree: a leaf is read,
stepped by all of them and written, and a large leaf slice by slice (see `slices`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamite import checks
from adamite.engine.matching import counterparts
from adamite.engine.placement import settle
from adamite.engine.slices import cut, sweep
from adamite.numerics import as_array, cast, is_none, wide_dtype, widen
from adamite.random_bits import element_index, fold, random_bits

SLICED = 2**12
"""Smaller leaves are stepped whole."""


class Part(NamedTuple):
    """What such a transformation does to a tree, and to one leaf or a slice of it."""

    init: Callable[[optax.Params], Any]
    """``init(params) -> state``."""

    begin: Callable[[optax.Updates, Any, optax.Params | None], tuple[Any, list[Any]]]
    """``begin(updates, state, params) -> (scalars, columns)``: checks the trees; what is computed once a step, and what
    the state holds for each leaf of the updates, None being one: a tree of arrays of its rank."""

    step: Callable[..., tuple[jax.Array, Any]]
    """``step(scalars, u, p, stored, bits) -> (u, stored)`` for a leaf: u and p of at least float32 and one shape, p
    None if there are no parameters; ``bits(key)`` gives random bits for each element."""

    end: Callable[[Any, list[Any], Any], Any]
    """``end(state, columns, structure) -> state``, with the new columns."""

    weights: Callable[[jax.Array, Any], jax.Array] | None = None
    """``weights(p, stored)``: what stands for the parameters in all parts before this one, float32. A part that has it
    comes last, is given p as it is, and returns updates that must not be rounded any more."""

    block: int = 1
    """How many elements along the last axis are stepped together."""

    in_slices: bool = False
    """Whether large leaves are stepped in slices, because XLA would not fuse the step into one pass."""


class Leafwise(optax.GradientTransformationExtraArgs):
    """A gradient transformation that can be part of one pass."""

    part: Part | None = None


def leafwise(part: Part) -> Leafwise:
    """The gradient transformation that runs `part`. Updates come back in the gradients' dtypes."""
    run = runner(part)

    def init(params: optax.Params) -> Any:
        return settle(part.init(params), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        return run(updates, state, params)

    tx = Leafwise(init, update)
    tx.part = part
    return tx


def compose(parts: Sequence[Part]) -> Part:
    """Parts, one after the other on each leaf. The state is a tuple of theirs."""
    last, weights = parts[-1], parts[-1].weights

    def begin(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[Any, list[Any]]:
        states = checks.states(state, len(parts))
        opened = [part.begin(updates, its_state, params) for part, its_state in zip(parts, states, strict=True)]
        scalars, columns = zip(*opened, strict=True)
        return scalars, list(zip(*columns, strict=True))

    def step(scalars: Any, u: Any, p: Any, stored: Any, bits: Any) -> tuple[Any, Any]:
        seen = weights(p, stored[-1]) if weights else p
        new = []
        for part, its_scalars, s in zip(parts, scalars, stored, strict=True):
            u, s = part.step(its_scalars, u, p if part is last else seen, s, bits)
            new.append(s)
        return u, tuple(new)

    def end(state: Any, columns: list[Any], structure: Any) -> Any:
        return tuple(
            part.end(s, [row[i] for row in columns], structure)
            for i, (part, s) in enumerate(zip(parts, state, strict=True))
        )

    return Part(
        init=lambda params: tuple(part.init(params) for part in parts),
        begin=begin,
        step=step,
        end=end,
        weights=weights and (lambda p, stored: weights(p, stored[-1])),
        block=max(part.block for part in parts),
        in_slices=any(part.in_slices for part in parts),
    )


def runner(part: Part, *, rounded: bool = True) -> Callable[..., tuple[optax.Updates, Any]]:
    """``run(updates, state, params) -> (updates, state)`` of `part`.

    Args:
        part: what to run.
        rounded: give the updates in the gradients' dtypes, rounded once; or in at least float32.
    """
    rounded = rounded and part.weights is None

    def one(scalars: Any, number: Any, turn: Any, g: Any, p: Any, stored: Any) -> tuple[Any, jax.Array, Any]:
        def step(read: Any, written: Any, index: Callable[[], jax.Array]) -> tuple[jax.Array, Any]:
            g, p = read
            p = widen(p) if p is not None and part.weights is None else p
            u, new = part.step(scalars, widen(g), p, written, lambda key: random_bits(fold(key, number), index()))
            return cast(u, g.dtype) if rounded else u, new

        if not part.in_slices or g.size < SLICED:
            return turn, *step((g, p), stored, lambda: element_index(g.shape))
        blank = jnp.full_like(g, turn, g.dtype if rounded else wide_dtype(g.dtype))
        return sweep(cut(g.shape, part.block, jax.device_count()), step, turn, (g, p), stored, blank)

    if part.in_slices:
        one = _placed(one)
    traced_once = functools.cache(lambda: jax.jit(one))

    def run(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[optax.Updates, Any]:
        scalars, columns = part.begin(updates, state, params)
        checks.differentiable(updates, "updates")
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        weights = [None] * len(leaves) if params is None else counterparts(updates, params, "params")
        step = traced_once() if part.in_slices or _worth_tracing_once(leaves) else one
        turn, results = _first_turn(scalars) if part.in_slices else None, []
        for number, (g, p, stored) in enumerate(zip(leaves, weights, columns, strict=True)):
            if g is not None:
                turn, g, stored = step(scalars, number, turn, as_array(g), None if p is None else as_array(p), stored)
            results.append((g, stored))
        new = part.end(state, [stored for _, stored in results], structure)
        return structure.unflatten([u for u, _ in results]), new

    return run


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


def _worth_tracing_once(leaves: list[Any]) -> bool:
    """Whether a jitted step, which is traced once a shape, spares tracing: where a shape recurs under jit."""
    leaves = [g for g in leaves if g is not None]
    return any(isinstance(g, Tracer) for g in leaves) and len({jnp.shape(g) for g in leaves}) < len(leaves)
