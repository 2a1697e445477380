"""A step as a program: what it does to one block of elements, in a form that does not depend on its numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from adamite.engines.leaf_step import split

BLOCK = 256
"""Elements of a block where a step names no other size."""


class Input(NamedTuple):
    """An array that the program reads, or writes."""

    place: int  # in the list of leaf arrays: g, p, then those of the state; -1: over none of these
    kind: str  # "element" or "block"
    dtype: str
    value: str  # its name in the program


class Equation(NamedTuple):
    """One operation."""

    name: str  # of the result
    kind: str
    dtype: str
    operation: str
    arguments: tuple[str, ...]  # names of results, "@base", "@number", "$k", "#bits", or integers as they are written


class Program(NamedTuple):
    """A step of one leaf, as `writing` writes it down."""

    name: str
    text: str
    equations: tuple[Equation, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]
    scalars: tuple[str, ...]  # the dtypes of $0, $1, ...
    literals: tuple[Any, ...]  # what they are where that is known without the scalars, else None
    dtypes: dict[str, str]  # of every value
    outer: ClosedJaxpr  # from the arrays among the scalars to the operands that are not literals
    block: int
    by_rows: bool  # whether blocks end where a row ends

    def operands(self, scalars: Any) -> list[jax.Array]:
        """The operands as a kernel takes them: arrays of shape (), uint32, floats by their bits."""
        computed = iter(jaxpr_as_fun(self.outer)(*split(scalars)[0]))
        values = [next(computed) if x is None else x for x in self.literals]
        return [_bits(jnp.asarray(x, dtype)) for x, dtype in zip(values, self.scalars, strict=True)]


class UnsupportedError(Exception):
    """A step that has no program; the message says why."""


def _bits(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return x if x.dtype == jnp.uint32 else jax.lax.bitcast_convert_type(x, jnp.uint32)
