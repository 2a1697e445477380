"""The arrays of a custom call that steps leaves: each result lies over the argument that it replaces."""

from collections.abc import Iterable
from typing import Any

import jax

from adamite.engines.leaf_step import Leaf, LeafStep
from adamite.engines.native.program import Program


class Arrays:
    """Arguments and results of a call.

    Attributes:
        arguments: what is read.
        shapes: what is written, as `jax.ffi.ffi_call` wants to know it.
        aliases: the results that lie over arguments, by the numbers of both.
    """

    def __init__(self, step: LeafStep, *arguments: jax.Array) -> None:
        """Of calls of `step`, the first arguments of which are no leaf's."""
        self.step = step
        self.arguments = list(arguments)
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.aliases: dict[int, int] = {}
        self.leaves: list[tuple[Leaf, Program]] = []

    def add(self, leaf: Leaf, program: Program) -> None:
        """Add the arrays of a leaf."""
        self.leaves.append((leaf, program))
        places = {x.place: len(self.arguments) + k for k, x in enumerate(program.inputs)}
        self.arguments += [leaf.arrays[x.place] for x in program.inputs]
        for x in program.outputs:
            if x.place in places:
                self.aliases[places[x.place]] = len(self.shapes)
            like = leaf.g if x.kind == "element" else leaf.arrays[x.place]
            self.shapes.append(jax.ShapeDtypeStruct(like.shape, x.dtype))

    def stepped(self, results: Iterable[jax.Array]) -> list[tuple[jax.Array, Any]]:
        """Of each leaf the weights or the update, and what the state then holds. What is not written stays."""
        each = iter(results)
        stepped = []
        for leaf, program in self.leaves:
            new = {x.place: next(each) for x in program.outputs}
            begin = len(leaf.arrays) - len(leaf.kept)
            stored = [new.get(begin + k, x) for k, x in enumerate(leaf.kept)]
            before = leaf.arrays[int(self.step.ends_with_weights)]
            first = next((x for place, x in new.items() if place < begin), before)
            stepped.append((first, jax.tree.unflatten(jax.tree.structure(leaf.stored), stored)))
        return stepped
