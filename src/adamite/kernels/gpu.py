"""The Pallas kernel for GPUs, compiled by Triton: each program of the grid steps a few blocks, or a run of elements.

A leaf of any rank is seen as rows of its last axis; where nothing is kept in blocks, as one row. Programs that reach
beyond the end of a row step its last element several times, all with the same result: so no array needs to be padded,
and a block's largest element is that of the block.

Small leaves are taken together, each by some programs of one grid.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adamite.kernels.leaf import Fused, Leaf, first_of_row, kind, split, step_once, typed, unserved

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8, jnp.int16)))
TILE, WARPS = 1024, 4
SMALL, TOGETHER = 2**18, 32


class View(NamedTuple):
    """A leaf as rows, and the tile that a program steps."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def across(self) -> int:
        """How many tiles there are in a row."""
        return math.ceil(self.columns / self.width)

    @property
    def programs(self) -> int:
        """How many tiles there are."""
        return math.ceil(self.rows / self.height) * self.across


def why_not(fused: Fused, leaf: Leaf) -> str:
    """Why this kernel does not take a leaf; "" if it does."""
    if leaf.p.size >= 2**31:
        return "it has 2^31 elements or more"
    return unserved(fused, leaf, DTYPES)


def run(fused: Fused, scalars: Any, leaves: Sequence[Leaf], *, interpret: bool = False) -> list[tuple[jax.Array, Any]]:
    """The leaves after a step: weights and what the state holds of each."""
    small = [i for i, leaf in enumerate(leaves) if leaf.p.size <= SMALL]
    groups = [[i] for i, leaf in enumerate(leaves) if leaf.p.size > SMALL]
    groups += [small[i : i + TOGETHER] for i in range(0, len(small), TOGETHER)]
    results: dict[int, Any] = {}
    for group in groups:
        done = _launch(fused, scalars, [leaves[i] for i in group], interpret)
        results |= dict(zip(group, done, strict=True))
    return [results[i] for i in range(len(leaves))]


def _launch(fused: Fused, scalars: Any, leaves: Sequence[Leaf], interpret: bool) -> list[tuple[jax.Array, Any]]:
    """One kernel for some leaves."""
    numbers, put = split((scalars, [leaf.place.origin if leaf.place else 0 for leaf in leaves]))
    numbers = [x.reshape(1) for x in numbers]
    views = [_view(leaf.p, fused.block) for leaf in leaves]
    read = [jax.tree.flatten((leaf.g, leaf.p, leaf.stored)) for leaf in leaves]
    kinds = [[kind(x, leaf.p, fused.block) for x in xs] for leaf, (xs, _) in zip(leaves, read, strict=True)]
    first = [0, *np.cumsum([view.programs for view in views]).tolist()]

    def body(*refs: Any) -> None:
        left = iter(refs)

        def take(n: int) -> list[Any]:
            return list(itertools.islice(left, n))

        values, origins = put([ref[0] for ref in take(len(numbers))])
        inputs = [take(len(its)) for its in kinds]
        outputs = [take(len(its) - 1 - its.count("all")) for its in kinds]
        program = pl.program_id(0)
        for i, (leaf, view, (_, form)) in enumerate(zip(leaves, views, read, strict=True)):

            def mine(i: int = i, leaf: Leaf = leaf, view: View = view, form: Any = form) -> None:
                tile, origin = program - first[i], jnp.asarray(origins[i], jnp.uint32)
                _step_tile(fused, values, leaf, view, origin, form, kinds[i], inputs[i], outputs[i], tile)

            if len(leaves) == 1:
                mine()
            else:
                pl.when((program >= first[i]) & (program < first[i + 1]))(mine)

    def shaped(view: View, x: jax.Array, what: str) -> tuple[int, ...]:
        return (1, 1) if what == "all" else (view.rows, view.columns if what == "each" else x.size // view.rows)

    arguments: list[jax.Array] = [*numbers]
    results: list[jax.ShapeDtypeStruct] = []
    aliases: dict[int, int] = {}
    for view, (xs, _), its in zip(views, read, kinds, strict=True):
        for i, (x, what) in enumerate(zip(xs, its, strict=True)):
            if i and what != "all":
                aliases[len(arguments)] = len(results)
                results.append(typed(shaped(view, x, what), x.dtype, xs))
            arguments.append(x.reshape(shaped(view, x, what)))
    new = pl.pallas_call(
        body,
        grid=(first[-1],),
        out_shape=results,
        input_output_aliases=aliases,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="adamite_step",
    )(*arguments)
    left = iter(new)
    done = []
    for (xs, form), its in zip(read, kinds, strict=True):
        after = [x if what == "all" else next(left).reshape(x.shape) for x, what in zip(xs[1:], its[1:], strict=True)]
        done.append(form.unflatten([xs[0], *after])[1:])
    return done


def _step_tile(
    fused: Fused,
    scalars: Any,
    leaf: Leaf,
    view: View,
    origin: Any,
    form: Any,
    kinds: Any,
    ins: Any,
    outs: Any,
    tile: Any,
) -> None:
    """Step one tile of a leaf."""
    across = tile % view.across
    row = jnp.minimum(tile // view.across * view.height + jnp.arange(view.height), view.rows - 1)[:, None]
    column = jnp.minimum(across * view.width + jnp.arange(view.width), view.columns - 1)[None, :]
    where = {"each": (row, column), "block": (row, across + jnp.zeros((1, 1), jnp.int32)), "all": (0, 0)}

    def index() -> jax.Array:
        """Rows are of the last axis, or one row is the leaf."""
        down, here = row.astype(jnp.uint32), column.astype(jnp.uint32)
        if leaf.place is None or leaf.p.ndim < 2:
            return down * jnp.uint32(view.columns) + here + origin
        if view.columns != leaf.p.shape[-1]:
            down, here = here // jnp.uint32(leaf.p.shape[-1]), here % jnp.uint32(leaf.p.shape[-1])
        rows = jnp.uint32(leaf.p.shape[-2])
        return first_of_row(leaf, down % rows, down // rows) + here + origin

    g, p, stored = form.unflatten([ref[where[what]] for ref, what in zip(ins, kinds, strict=True)])
    new = jax.tree.leaves(step_once(fused.step, leaf.dtype)(scalars, jnp.uint32(leaf.number), index(), g, p, stored))
    changed = [(what, x) for what, x in zip(kinds[1:], new, strict=True) if what != "all"]
    for ref, (what, x) in zip(outs, changed, strict=True):
        ref[where[what]] = x


def _view(p: jax.Array, block: int) -> View:
    """How a leaf is seen and cut."""
    if block == 1 or p.ndim == 0:
        return View(1, p.size, 1, TILE)
    return View(p.size // p.shape[-1], p.shape[-1], max(1, TILE // block), block)
