"""Which steps have kernels: rules x moments x weights x what a step ends with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import adamite
from adamite.core.tree_pass import TreePass
from adamite.engines.leaf_step import Leaf
from adamite.engines.native.program import Program
from adamite.engines.native.tracing import program

SHAPE = (32, 256)
"""Of a leaf that int8 moments are quantized for."""


class Kernel(NamedTuple):
    """A program and what it is compiled with."""

    program: Program
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
    ("float32", "bfloat16", None),
    ("bfloat16", "bfloat16", None),
    ("bfloat16", "float32", None),
    *(("bfloat16", g, rounding) for rounding in adamite.rounding.NAMES for g in ("bfloat16", "float32")),
)
"""Dtypes of weights and gradients, and the rounding."""


class Step(NamedTuple):
    """A kind of step that has a kernel."""

    recipe: str
    moments: str
    weights: str
    gradients: str
    rounding: str | None
    result: str = "weights"
    """What the step ends with: "weights" or "update"."""

    def __str__(self) -> str:
        return (
            f"{self.recipe}, {self.moments} moments, {self.weights} weights, {self.gradients} gradients, "
            f"rounding {self.rounding}{', update' if self.result == 'update' else ''}"
        )

    def program(self, variation: int = 0) -> Program:
        """Its program, with one of two settings of its numbers."""
        tx = RECIPES[self.recipe](variation, moments=self.moments, rounding=self.rounding)
        params, updates = {"leaf": jnp.zeros(SHAPE, self.weights)}, {"leaf": jnp.zeros(SHAPE, self.gradients)}
        scalars, (stored,) = tx.part.begin(updates, tx.init(params), params)
        run = TreePass(tx.part)
        step = run.to_updates if self.result == "update" else run.to_weights
        g, p = updates["leaf"], params["leaf"]
        return program(step, scalars, Leaf(0, g, p, stored, run.rounded_to(step, g, p)))


def steps() -> list[Step]:
    """All kinds. Updates that are float32 throughout are XLA's."""
    return [
        Step(recipe, moments, *how, result)
        for recipe in RECIPES
        for moments in MOMENTS
        for how in WEIGHTS
        for result in ("weights", "update")
        if result == "weights" or (moments, *how[:2]) != ("float32",) * 3
    ]


def kernels(only: str = "") -> list[Kernel]:
    """All of them, each program once; of one recipe alone if it is named."""
    found: dict[str, Kernel] = {}
    for step in steps():
        if not only or step.recipe == only:
            program = step.program()
            found.setdefault(program.name, Kernel(program, [])).recipes.append(str(step))
    return list(found.values())


def step_of(name: str, weights: str, gradients: str) -> Step | None:
    """The kind of step whose program has this name, as JAX traces it now; None: it is none of the grid."""
    return _by_name(weights, gradients).get(name)


@functools.cache
def _by_name(weights: str, gradients: str) -> dict[str, Step]:
    return {step.program().name: step for step in steps() if (step.weights, step.gradients) == (weights, gradients)}
