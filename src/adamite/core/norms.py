"""Sums over all elements of leaves, of groups of leaves and of what several devices have of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamite.numerics import over_devices, widen


def sum_of_squares(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """``sum |x|^2``, in float32 at least, of what all devices have of a leaf.

    Half of `x` times `x`: Adam squares the gradient, too, and XLA's CPU compiler would compute both squares once, and
    write them to memory in between.
    """
    x = widen(x)
    return jnp.asarray(over_devices(2 * jnp.sum((x.conj() * (0.5 * x)).real), x, axes))


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``sum x``, of what all devices have of a leaf."""
    return jnp.asarray(over_devices(jnp.sum(x), x, axes))


def norm(tree: Any, axes: tuple[str, ...]) -> jax.Array:
    """The Euclidean norm of all leaves together."""
    squares = [sum_of_squares(g, axes) for g in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.zeros(())


def by_group(
    groups: list[str], column: list[Any], one: Callable[..., Any], *others: list[Any], unknown: float
) -> dict[str, jax.Array]:
    """``one`` of the sums over each group, and over all leaves together, whose name is "": float32, shape ().

    Args:
        groups: the name of each leaf's group.
        column: a number for each leaf, of shape (); None: that leaf has none, and does not count.
        one: a function from the sum to a number, and from those of `others`.
        others: more such columns.
        unknown: what stands for a group without numbers.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("", *groups)}
    for group, row in zip(groups, zip(column, *others, strict=True), strict=True):
        if row[0] is not None:
            for name in {"", group}:
                rows[name].append(row)
    sums = {name: [jnp.sum(jnp.stack(of)) for of in zip(*found, strict=True)] for name, found in rows.items()}
    return {name: jnp.float32(one(*of) if of else unknown) for name, of in sums.items()}
