"""Which steps have kernels: rules x moments x weights."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adamite
from adamite.engine.leafwise import Pass
from adamite.kernels.leaf import Leaf
from adamite.kernels.program import program
from adamite.kernels.writing import Program

SHAPE = (32, 256)
"""Of a leaf that int8 moments are quantized for."""


class Kernel(NamedTuple):
    """A program and what it is compiled with."""

    program: Program
    fixed: dict[int, int]  # operands that no setting of the recipe changes, by their bits
    recipes: list[str]


def _adam_like(recipe: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def make(variation: int, **options: Any) -> Any:
        values = ((1e-3, 0.9, 0.999, 1e-8, 0.0), (3e-4, 0.8, 0.95, 1e-6, 1e-12))[variation]
        learning_rate, b1, b2, eps, eps_root = values
        return recipe(learning_rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root, **fixed, **options)

    return make


def _decaying(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda variation, **options: make(variation, weight_decay=(0.1, 0.03)[variation], **options)


def _lion(variation: int, **options: Any) -> Any:
    learning_rate, b1, b2 = ((1e-4, 0.9, 0.99), (3e-4, 0.8, 0.95))[variation]
    return adamite.lion(learning_rate, b1, b2, **options)


def _rmsprop(variation: int, **options: Any) -> Any:
    learning_rate, decay, eps = ((1e-3, 0.9, 1e-8), (3e-4, 0.95, 1e-6))[variation]
    return adamite.rmsprop(learning_rate, decay, eps, **options)


def _sgd(variation: int, **options: Any) -> Any:
    learning_rate, momentum = ((0.1, 0.9), (0.03, 0.8))[variation]
    return adamite.sgd(learning_rate, momentum, **options)


RECIPES: dict[str, Callable[..., Any]] = {
    "adam": _adam_like(adamite.adam),
    "adamw": _decaying(_adam_like(adamite.adamw)),
    "nadam": _adam_like(adamite.nadam),
    "nadamw": _decaying(_adam_like(adamite.nadamw)),
    "amsgrad": _adam_like(adamite.amsgrad),
    "amsgrad, the largest before its correction": _adam_like(adamite.amsgrad, max_before_correction=True),
    "adabelief": _adam_like(adamite.adabelief),
    "lion": lambda variation, **options: _lion(variation, weight_decay=0.0, **options),
    "lion with decay": _decaying(_lion),
    "rmsprop": _rmsprop,
    "sgd with momentum": _sgd,
    "sgd with Nesterov's momentum": lambda variation, **options: _sgd(variation, nesterov=True, **options),
}
"""From the number of a setting, 0 or 1, of which all numbers differ, to an optimizer."""

MOMENTS = ("float32", "bfloat16", "int8")

WEIGHTS = (
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", None),
    *(("bfloat16", g, rounding) for rounding in adamite.rounding.NAMES for g in ("bfloat16", "float32")),
)
"""Dtypes of weights and gradients, and the rounding."""


def kernels(only: str = "") -> list[Kernel]:
    """All of them, each program once."""
    found: dict[str, Kernel] = {}
    for name, make in RECIPES.items():
        if only and name != only:
            continue
        for moments in MOMENTS:
            for weights, gradients, rounding in WEIGHTS:
                options = {"moments": moments, "rounding": rounding}
                leaf = jnp.zeros(SHAPE, weights), jnp.zeros(SHAPE, gradients)
                first, second = (_program(make(variation, **options), *leaf) for variation in (0, 1))
                label = f"{name}, {moments} moments, {weights} weights, {gradients} gradients, rounding {rounding}"
                if first.name != second.name:
                    raise ValueError(f"{label}: its numbers change its program")
                if first.name in found:
                    found[first.name].recipes.append(label)
                else:
                    found[first.name] = Kernel(first, dict(_fixed(first, second)), [label])
    return list(found.values())


def _program(tx: Any, p: jax.Array, g: jax.Array) -> Program:
    params, updates = {"leaf": p}, {"leaf": g}
    scalars, (stored,) = tx.part.begin(updates, tx.init(params), params)
    return program(Pass(tx.part).fused, scalars, Leaf(0, g, p, stored, g.dtype))


def _fixed(first: Program, second: Program) -> Iterator[tuple[int, int]]:
    for k, (x, y, dtype) in enumerate(zip(first.literals, second.literals, first.scalars, strict=True)):
        if x is not None and y is not None and x == y and dtype == "float32":
            yield k, int(np.float32(x).view(np.uint32))
