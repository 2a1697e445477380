"""The parts of a transformation that treats every element by itself, and how several become one.

Adam, the weight decay behind it, the learning rate and the rounding of weights each change an element of the update by
what they know of that element alone. So they need not be done one after the other on the whole tree: a leaf is read,
stepped by all of them and written (see `tree_pass`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adamite import checks


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

    to_weights: Callable[..., tuple[jax.Array, Any]] | None = None
    """``to_weights(scalars, u, p, stored, bits) -> (p, stored)``: as `step`, but with the new weights, of p's dtype, in
    place of updates that lead there. A part that has `weights` has it."""

    block: int = 1
    """How many elements along the last axis are stepped together."""

    in_slices: bool = False
    """Whether large leaves are stepped in slices, because XLA would not fuse the step into one pass."""

    few_bits: Callable[[Any], bool] = lambda _: False
    """``few_bits(stored)``: whether a moment of the leaf is stored in fewer bits than a float32 has; then no sum may
    depend on the program (see `engines.products`)."""

    elementwise: bool = True
    """Whether an element, or a block of them, is stepped by what is known of it alone; else of the whole leaf."""


def compose(parts: Sequence[Part]) -> Part:
    """Parts, one after the other on each leaf. The state is a tuple of theirs."""
    last, weights = parts[-1], parts[-1].weights

    def begin(updates: optax.Updates, state: Any, params: optax.Params | None) -> tuple[Any, list[Any]]:
        states = checks.states(state, len(parts))
        opened = [part.begin(updates, its_state, params) for part, its_state in zip(parts, states, strict=True)]
        scalars, columns = zip(*opened, strict=True)
        return scalars, list(zip(*columns, strict=True))

    def step_by(end_by: Callable[..., Any], scalars: Any, u: Any, p: Any, stored: Any, bits: Any) -> tuple[Any, Any]:
        seen = weights(p, stored[-1]) if weights else p
        new = []
        for part, own_scalars, s in zip(parts, scalars, stored, strict=True):
            u, s = end_by(own_scalars, u, p, s, bits) if part is last else part.step(own_scalars, u, seen, s, bits)
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
        step=functools.partial(step_by, last.step),
        end=end,
        to_weights=last.to_weights and functools.partial(step_by, last.to_weights),
        weights=weights and (lambda p, stored: weights(p, stored[-1])),
        block=max(part.block for part in parts),
        in_slices=any(part.in_slices for part in parts),
        few_bits=lambda stored: any(part.few_bits(s) for part, s in zip(parts, stored, strict=True)),
        elementwise=all(part.elementwise for part in parts),
    )
