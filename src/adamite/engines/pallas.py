"""The Pallas kernel for TPUs: a leaf goes through the chip's fast memory once, in tiles of rows.

A leaf of any rank is seen as (lead, rows, columns): TPUs lay the last two axes out in tiles, so that all others can be
taken together without a copy. The grid brings in a tile of about 2^17 elements at a time; inside, 32 rows of a block's
width, which fit the registers, are stepped after one another. Where a block ends beyond the last column, it is stepped
at its own width: nothing is padded. Rows beyond the last are read as anything and not written.

One number for each block is kept in a tile that has all of a row's: at each block one of them is replaced.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adamite.engines.leaf_step import Leaf, LeafStep, first_of_row, kind, split, step_once, typed, unserved

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.int16)))
TILE, ROWS, WIDTH = 2**17, 32, 256
COLUMNS = 4096
FAST_MEMORY = 2**26
"""Bytes that a kernel may use of it."""
SMALL, TOGETHER = 2**14, 2**17
"""Leaves of so few elements are taken several at a time, so many elements together."""


class View(NamedTuple):
    """A leaf as three axes, and how they are cut."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    height: int
    """How many rows are stepped at once."""
    width: int
    """How many columns."""

    @property
    def grid(self) -> tuple[int, ...]:
        """How many tiles there are along each axis."""
        return tuple(math.ceil(n / m) for n, m in zip(self.shape, self.tile, strict=True))


def why_not(step: LeafStep, leaf: Leaf) -> str:
    """Why this kernel does not take a leaf; "" if it does."""
    reason = unserved(step, leaf, DTYPES)
    if not reason and leaf.g.ndim == 1 and _folded(leaf.g.size, step.block) > 2**15:
        return "it has one long axis"
    return reason


def run(
    step: LeafStep, scalars: Any, leaves: Sequence[Leaf], *, interpret: bool = False
) -> list[tuple[jax.Array, Any]]:
    """The leaves after a step: weights and what the state holds of each."""
    results: list[Any] = [None] * len(leaves)
    for group in _groups(step, leaves):
        done = _launch(step, scalars, [leaves[i] for i in group], interpret)
        for i, result in zip(group, done, strict=True):
            results[i] = result
    return results


def _groups(step: LeafStep, leaves: Sequence[Leaf]) -> list[list[int]]:
    """Which leaves are taken together: large ones alone."""
    groups: list[list[int]] = []
    room = 0
    for i, leaf in enumerate(leaves):
        view = _view(leaf.g.shape, step.block)
        if leaf.g.size > SMALL or view.grid != (1, 1, 1):
            groups.insert(0, [i])
        elif leaf.g.size > room:
            groups.append([i])
            room = TOGETHER - leaf.g.size
        else:
            groups[-1].append(i)
            room -= leaf.g.size
    return groups


def _launch(step: LeafStep, scalars: Any, leaves: Sequence[Leaf], interpret: bool) -> list[tuple[jax.Array, Any]]:
    """One kernel for one leaf, or for several small ones, which are then whole in the fast memory."""
    numbers, put = split((scalars, [leaf.place.origin if leaf.place else 0 for leaf in leaves]))
    numbers = [x.reshape(1, 1) for x in numbers]
    alone = len(leaves) == 1
    views = [_view(leaf.g.shape, step.block) for leaf in leaves]
    read = [jax.tree.flatten((leaf.g, leaf.p, leaf.stored)) for leaf in leaves]
    written = [jax.tree.flatten((_result(step, leaf), leaf.stored)) for leaf in leaves]

    def body(*refs: Any) -> None:
        left = iter(refs)

        def take(n: int) -> list[Any]:
            return list(itertools.islice(left, n))

        values, origins = put([ref[...] for ref in take(len(numbers))])
        inputs = [take(len(arrays)) for arrays, _ in read]
        outputs = [take(len(arrays)) for arrays, _ in written]
        at = tuple(pl.program_id(axis) for axis in range(3)) if alone else (0, 0, 0)
        for leaf, view, origin, (_, form), ins, outs in zip(leaves, views, origins, read, inputs, outputs, strict=True):
            _step_tile(step, values, leaf, view, jnp.asarray(origin, jnp.uint32), form, ins, outs, at)

    def spec(view: View, x: jax.Array, like: jax.Array) -> pl.BlockSpec:
        what = kind(x, like, step.block)
        if what == "all":
            return pl.BlockSpec((1, 1, 1), lambda *_: (0, 0, 0))
        if what == "each":
            return pl.BlockSpec(view.tile, lambda *at: at if alone else (0, 0, 0))
        tile = (*view.tile[:2], math.ceil(view.shape[2] / step.block))
        return pl.BlockSpec(tile, lambda *at: (*at[:2], 0) if alone else (0, 0, 0))

    def shaped(view: View, x: jax.Array, like: jax.Array) -> tuple[int, ...]:
        what = kind(x, like, step.block)
        if what == "all":
            return 1, 1, 1
        return view.shape if what == "each" else (*view.shape[:2], math.ceil(view.shape[2] / step.block))

    def each(side: Sequence[Any]) -> list[tuple[View, jax.Array, jax.Array]]:
        return [(view, x, leaf.g) for view, leaf, (xs, _) in zip(views, leaves, side, strict=True) for x in xs]

    # Results lie over what they replace. An update replaces nothing: XLA would copy the gradient, were it to lie there.
    aliases: dict[int, int] = {}
    place, result = len(numbers), 0
    for (inputs, _), (outputs, _) in zip(read, written, strict=True):
        place, result = place + len(inputs), result + len(outputs)
        kept = len(outputs) if step.ends_with_weights else len(outputs) - 1
        aliases |= {place - i: result - i for i in range(kept, 0, -1)}
    new = pl.pallas_call(
        body,
        grid=views[0].grid if alone else (1, 1, 1),
        in_specs=[pl.BlockSpec((1, 1), lambda *_: (0, 0))] * len(numbers) + [spec(*one) for one in each(read)],
        out_specs=[spec(*one) for one in each(written)],
        out_shape=[typed(shaped(*one), one[1].dtype, (*numbers, *read[0][0])) for one in each(written)],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=FAST_MEMORY),
        interpret=interpret,
        name="adamite_step",
    )(*numbers, *(one[1].reshape(shaped(*one)) for one in each(read)))
    new = iter([x.reshape(one[1].shape) for x, one in zip(new, each(written), strict=True)])
    return [form.unflatten([next(new) for _ in xs]) for xs, form in written]


def _result(step: LeafStep, leaf: Leaf) -> Any:
    """Of the shape and dtype of what a step ends with."""
    return leaf.p if step.ends_with_weights else jax.ShapeDtypeStruct(leaf.g.shape, leaf.dtype)


def _step_tile(
    step: LeafStep, scalars: Any, leaf: Leaf, view: View, origin: jax.Array, form: Any, ins: Any, outs: Any, at: Any
) -> None:
    """Step what a tile has of a leaf, block after block."""
    columns, (depth, tall, wide) = view.shape[2], view.tile
    height, width = view.height, view.width
    blocks, rest = divmod(columns, width)
    here = wide // width  # how many whole blocks are in this tile
    if columns % wide or here * width > columns:
        here = jnp.minimum(here, blocks - at[2] * (wide // width))
    last = view.grid[2] - 1
    kinds = [kind(x, leaf.g, step.block) for x in leaf.arrays]
    results = ["each", *kinds[len(kinds) - len(leaf.kept) :]]

    def step_block(layer: Any, row: Any, block: Any, width: int) -> None:
        start = block * view.width
        start = pl.multiple_of(start, math.gcd(view.width, 128)) if not isinstance(start, int) else start
        down = pl.ds(pl.multiple_of(row * height, height) if not isinstance(row, int) else row * height, height)
        number = at[2] * (wide // view.width) + block  # of the block in its row

        def load(ref: Any, what: str) -> jax.Array:
            if what == "all":
                return ref[0]
            if what == "each":
                return ref[layer, down, pl.ds(start, width)]
            x = ref[layer, down, :]
            return x if x.shape[1] == 1 else jnp.sum(jnp.where(_lanes(x) == number, x, 0), 1, keepdims=True)

        def store(ref: Any, what: str, new: jax.Array) -> None:
            if what == "all":
                ref[0] = new
            elif what == "each":
                ref[layer, down, pl.ds(start, width)] = new
            else:
                x = ref[layer, down, :]
                ref[layer, down, :] = new if x.shape[1] == 1 else jnp.where(_lanes(x) == number, new, x)

        def index() -> jax.Array:
            lead, top, left = (
                jnp.asarray(x, jnp.uint32)
                for x in (at[0] * depth + layer, at[1] * tall + row * height, number * view.width)
            )
            down = top + jax.lax.broadcasted_iota(jnp.uint32, (height, width), 0)
            across = left + jax.lax.broadcasted_iota(jnp.uint32, (height, width), 1)
            if leaf.g.ndim < 2:  # folded, in its own order
                return down * jnp.uint32(columns) + across + origin
            return first_of_row(leaf, down, lead) + across + origin

        g, p, stored = form.unflatten(map(load, ins, kinds))
        new = step_once(step, leaf.dtype)(scalars, jnp.uint32(leaf.number), index(), g, p, stored)
        for ref, what, x in zip(outs, results, jax.tree.leaves(new), strict=True):
            store(ref, what, x)

    def some_rows(layer: Any, row: Any) -> None:
        _each(here, lambda block: step_block(layer, row, block, width))
        if rest:
            ending = functools.partial(step_block, layer, row, blocks - last * (wide // width), rest)
            ending() if last == 0 else pl.when(at[2] == last)(ending)

    _each(depth, lambda layer: _each(tall // height, lambda row: some_rows(layer, row)))


def _each(count: Any, do: Any) -> None:
    """``do(0)``, ``do(1)``, ..."""
    if isinstance(count, int) and count <= 1:
        for i in range(count):
            do(i)
        return

    def body(i: Any, nothing: Any) -> Any:
        do(i)
        return nothing

    jax.lax.fori_loop(0, count, body, None)


def _lanes(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)


def _view(shape: tuple[int, ...], block: int) -> View:
    """How a leaf is seen and cut."""
    if len(shape) < 2:
        columns = _folded(math.prod(shape), block)
        shape = (math.prod(shape) // columns, columns)
    *lead, rows, columns = shape
    shape = (math.prod(lead), rows, columns)
    width = block if block > 1 else WIDTH
    wide = min(columns, max(COLUMNS // width, 1) * width)
    height = min(rows, ROWS)
    tall = height * max(1, min(TILE // (height * wide), rows // height))
    depth = max(1, min(TILE // (tall * wide), shape[0]))
    return View(shape, (depth, tall, wide), height, width)


def _folded(n: int, block: int) -> int:
    """How many columns a single axis is folded to. Elements lie in memory as they do then, so nothing is copied."""
    return 128 if block == 1 and n % 1024 == 0 else n
