"""How the rows of a leaf lie in the whole leaf, of which it may be one device's part."""

import math
from typing import NamedTuple

from adamite.engines.leaf_step import Leaf
from adamite.engines.native.program import BLOCK, Program
from adamite.random_bits import row_major


class Rows(NamedTuple):
    """Rows of columns."""

    rows: int
    columns: int
    axes: list[tuple[int, int]]
    """Length and stride of the axes that lead to a row, the last runs fastest. None: rows lie behind one another."""


def axes_of(leaf: Leaf) -> list[tuple[int, int]]:
    """The axes before the last: how many rows they have, and how far apart these lie in the whole leaf.

    Axes that lie behind one another in memory are one.
    """
    *lengths, columns = leaf.g.shape or (1,)
    *strides, _ = row_major(leaf.place.shape if leaf.place and leaf.place.shape else (*lengths, columns))
    axes: list[tuple[int, int]] = []
    for length, stride in zip(lengths, strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            length *= axes.pop()[0]
        axes.append((length, stride))
    return axes


def rows_of(program: Program, leaf: Leaf) -> Rows:
    """The rows of a leaf: one, where they lie behind one another and no block ends before its row does."""
    columns = leaf.g.shape[-1] if leaf.g.ndim else 1
    axes = axes_of(leaf)
    rows = math.prod(length for length, _ in axes)
    if axes and axes != [(rows, columns)]:
        return Rows(rows, columns, axes)
    whole = columns % BLOCK == 0 or not program.by_rows
    return Rows(1, rows * columns, []) if whole else Rows(rows, columns, [])
