"""The Pallas kernel for TPUs: a leaf goes through the chip's fast memory once, in tiles of rows.

A leaf of any rank is seen as (lead, rows, columns): TPUs lay the last two axes out in tiles, so that all others can be
taken together without a copy. The grid brings in a tile of about 2^17 elements at a time; inside, 32 rows of a block's
width, which fit the registers, are stepped after one another. Where a block ends beyond the last column, it is stepped
at its own width: nothing is padded. Rows beyond the last are read as anything and not written.

A vector is taken whole. XLA would copy it to give it three axes, for it lays a single axis out in another way. So the
kernel gets it with one axis, and copies it inside of the fast memory.

One number for each block is kept in a tile that has all of a row's: at each block one of them is replaced.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adamite.engines.leaf_step import Leaf, LeafStep, Place, first_of_row, kind, split, step_once, typed, unserved

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.int16)))
TILE, ROWS, WIDTH = 2**17, 32, 256
COLUMNS = 4096
FAST_MEMORY = 2**26
"""Bytes that a kernel may use of it."""


class View(NamedTuple):
    """A leaf as three axes, and how they are cut."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    height: int
    """How many rows are stepped at once."""
    width: int
    """How many columns."""
    staged: bool
    """Whether the kernel gets the arrays with one axis, and copies them inside of the fast memory."""

    @property
    def grid(self) -> tuple[int, ...]:
        """How many tiles there are along each axis."""
        return tuple(math.ceil(n / m) for n, m in zip(self.shape, self.tile, strict=True))


def is_lowered(step: LeafStep, leaf: Leaf) -> bool:
    """Whether JAX can lower the kernel: for a vector it has to know the chip, by the mesh or as the host's."""
    try:
        return not _view(leaf.g.shape, step.block).staged or pltpu.get_tpu_info() is not None
    except ValueError:
        return False


def why_not(step: LeafStep, leaf: Leaf) -> str:
    """Why this kernel does not take a leaf; "" if it does."""
    reason = unserved(step, leaf, DTYPES)
    if not reason and leaf.g.ndim == 1 and _folded(leaf.g.size, step.block) > 2**15:
        return "it has one long axis"
    return reason


def run(
    step: LeafStep, scalars: Any, leaves: Sequence[Leaf], *, interpret: bool = False
) -> list[tuple[jax.Array, Any]]:
    """The leaves after a step: the result and what the state holds of each."""
    numbers, _ = split(scalars)
    values, structure = jax.tree.flatten(scalars)
    constants = structure, tuple(None if isinstance(x, jax.Array) else (type(x), x) for x in values)
    results = []
    for leaf in leaves:
        origin, whole = (None, None) if leaf.place is None else (leaf.place.origin, leaf.place.shape)
        arrays, form = jax.tree.flatten((jnp.uint32(leaf.number), origin, leaf.g, leaf.p, leaf.stored))
        types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        alike = Alike(leaf.g.shape, leaf.dtype, whole, types, form, len(leaf.kept))
        key = "pallas", constants, alike, interpret
        if key not in step.programs:
            step.programs[key] = _launch(step, constants, alike, interpret)
        first, *kept = step.programs[key](numbers, arrays)
        results.append((first, jax.tree.structure(leaf.stored).unflatten(kept)))
    return results


class Alike(NamedTuple):
    """What leaves that share a kernel have in common."""

    shape: tuple[int, ...]
    dtype: Any
    """The dtype that updates are rounded to."""
    whole: tuple[int, ...] | None
    """The shape of the whole leaf, if this is one device's part of a leaf."""
    types: tuple[jax.ShapeDtypeStruct, ...]
    """Shape and dtype of each array."""
    form: Any
    """The structure of the arrays: the leaf's number, its first element's number, gradient, weights, state."""
    kept: int
    """How many arrays the state holds."""


class Result(NamedTuple):
    """An array that a kernel writes."""

    over: int | None
    """The place, among the arrays, of that which it is written over; None: it has a place of its own. An update has:
    XLA would copy the gradient, were it to lie there."""
    type: jax.ShapeDtypeStruct
    kind: str


def _results(step: LeafStep, alike: Alike, kinds: Sequence[str]) -> list[Result]:
    begin = len(alike.types) - alike.kept
    if step.ends_with_weights:
        first = Result(begin - 1, alike.types[begin - 1], "each")
    else:
        first = Result(None, jax.ShapeDtypeStruct(alike.shape, alike.dtype), "each")
    return [first, *(Result(i, alike.types[i], kinds[i]) for i in range(begin, len(alike.types)))]


def _launch(step: LeafStep, constants: Any, alike: Alike, interpret: bool) -> Callable[..., list[jax.Array]]:
    """``(numbers, arrays) -> arrays``: the kernel for one leaf. It is traced and compiled once for all leaves alike.

    Leaves alike differ in the values of operands only, so that their kernels are the same text. XLA compiles a text
    once.
    """
    structure, values = constants
    view = _view(alike.shape, step.block)
    kinds = [kind(x, jax.ShapeDtypeStruct(alike.shape, alike.dtype), step.block) for x in alike.types]
    results = _results(step, alike, kinds)

    def cut(x: jax.ShapeDtypeStruct, what: str) -> Cut:
        return _whole(x.shape) if view.staged and x.shape else _cut(view, what, step.block)

    cuts = [cut(x, what) for x, what in zip(alike.types, kinds, strict=True)]
    result_cuts = [cut(result.type, result.kind) for result in results]
    staged = [x for x in alike.types if view.staged and x.shape]
    staged_alone = [x.type for x in results if view.staged and x.type.shape and x.over is None]

    def launch(numbers: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        def body(*refs: Any) -> None:
            left = iter(refs)
            read = iter([next(left)[...] for _ in numbers])
            scalars = structure.unflatten([next(read) if x is None else x[1] for x in values])
            ins, outs = [next(left) for _ in kinds], [next(left) for _ in results]
            stages = [next(left) if view.staged and x.shape else None for x in alike.types]
            for ref, stage in zip(ins, stages, strict=True):
                if stage is not None:
                    stage[0] = ref[...].reshape(1, -1)
            stages_of_results = [
                None if not (view.staged and x.type.shape) else next(left) if x.over is None else stages[x.over]
                for x in results
            ]
            own_ins = [ref if stage is None else stage for ref, stage in zip(ins, stages, strict=True)]
            own_outs = [ref if stage is None else stage for ref, stage in zip(outs, stages_of_results, strict=True)]
            at = [pl.program_id(axis) for axis in range(3)]
            _step_tile(step, scalars, alike, view, kinds, own_ins, own_outs, at)
            for ref, stage in zip(outs, stages_of_results, strict=True):
                if stage is not None:
                    ref[...] = stage[0].reshape(ref.shape)

        operands = [x.reshape(1, 1) for x in numbers]
        operands += [x.reshape(cut.shape) for x, cut in zip(arrays, cuts, strict=True)]
        new = pl.pallas_call(
            body,
            grid=view.grid,
            in_specs=[*[_whole((1, 1)).spec] * len(numbers), *(cut.spec for cut in cuts)],
            out_specs=[cut.spec for cut in result_cuts],
            out_shape=[typed(c.shape, x.type.dtype, operands) for c, x in zip(result_cuts, results, strict=True)],
            scratch_shapes=[pltpu.VMEM((1, 1, *x.shape), x.dtype) for x in (*staged, *staged_alone)],
            input_output_aliases={len(numbers) + x.over: i for i, x in enumerate(results) if x.over is not None},
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=FAST_MEMORY),
            interpret=interpret,
            name="adamite_step",
        )(*operands)
        return [x.reshape(result.type.shape) for x, result in zip(new, results, strict=True)]

    return jax.jit(launch)


class Cut(NamedTuple):
    """The shape of an operand, and which part of it a tile needs."""

    shape: tuple[int, ...]
    spec: pl.BlockSpec


def _whole(shape: tuple[int, ...]) -> Cut:
    return Cut(shape, pl.BlockSpec(shape, lambda *_: (0,) * len(shape)))


def _cut(view: View, what: str, block: int) -> Cut:
    """An array of a kind, as three axes."""
    if what == "all":
        return _whole((1, 1, 1))
    if what == "each":
        return Cut(view.shape, pl.BlockSpec(view.tile, lambda *at: at))
    columns = math.ceil(view.shape[2] / block)
    return Cut((*view.shape[:2], columns), pl.BlockSpec((*view.tile[:2], columns), lambda *at: (*at[:2], 0)))


def _step_tile(
    step: LeafStep, scalars: Any, alike: Alike, view: View, kinds: Sequence[str], ins: Any, outs: Any, at: Any
) -> None:
    """Step what a tile has of a leaf, block after block."""
    columns, (depth, tall, wide) = view.shape[2], view.tile
    height, width = view.height, view.width
    blocks, rest = divmod(columns, width)
    here = wide // width  # how many whole blocks are in this tile
    if columns % wide or here * width > columns:
        here = jnp.minimum(here, blocks - at[2] * (wide // width))
    last = view.grid[2] - 1
    like: Any = jax.ShapeDtypeStruct(alike.shape, alike.dtype)
    place = None if alike.whole is None else Place(alike.whole, jnp.uint32(0))
    leaf = Leaf(0, like, None, (), alike.dtype, place)
    results = ["each", *kinds[len(kinds) - alike.kept :]]

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

        def index(origin: Any) -> jax.Array:
            lead, top, left = (
                jnp.asarray(x, jnp.uint32)
                for x in (at[0] * depth + layer, at[1] * tall + row * height, number * view.width)
            )
            down = top + jax.lax.broadcasted_iota(jnp.uint32, (height, width), 0)
            across = left + jax.lax.broadcasted_iota(jnp.uint32, (height, width), 1)
            across = across if origin is None else across + origin
            if len(alike.shape) < 2:  # folded, in its own order
                return down * jnp.uint32(columns) + across
            return first_of_row(leaf, down, lead) + across

        leaf_number, origin, g, p, stored = alike.form.unflatten(map(load, ins, kinds))
        new = step_once(step, alike.dtype)(scalars, leaf_number, index(origin), g, p, stored)
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
    else:
        jax.lax.fori_loop(0, count, lambda i, _: do(i), None)


def _lanes(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)


def _view(shape: tuple[int, ...], block: int) -> View:
    """How a leaf is seen and cut."""
    width, axes = block if block > 1 else WIDTH, len(shape)
    if axes < 2:
        columns = _folded(math.prod(shape), block)
        shape = (math.prod(shape) // columns, columns)
    *lead, rows, columns = shape
    shape = (math.prod(lead), rows, columns)
    wide = columns if axes < 2 else min(columns, max(COLUMNS // width, 1) * width)
    height = min(rows, ROWS)
    tall = height * max(1, min(TILE // (height * wide), rows // height))
    depth = max(1, min(TILE // (tall * wide), shape[0]))
    return View(shape, (depth, tall, wide), height, width, staged=axes == rows == 1)


def _folded(n: int, block: int) -> int:
    """How many columns a single axis is folded to. Elements lie in memory as they do then, so nothing is copied."""
    return 128 if block == 1 and n % 1024 == 0 else n
