"""One pass of a part over a tree: the trees are opened, each leaf is stepped by an engine, the trees are closed.

A pass ends with the update of each leaf, or with its weights. In both cases `adamite.engines` decides which engine
steps which leaf.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import keystr

from adamite import checks, engines
from adamite.core.matching import counterparts
from adamite.core.optimizer import Optimizer
from adamite.core.part import Part
from adamite.core.placement import settle
from adamite.engines import Leaf, LeafStep
from adamite.engines.closures import closed_over
from adamite.numerics import as_array, is_none, update_dtype, wide_dtype, widen
from adamite.paths import leaves_with_path
from adamite.random_bits import fold, random_bits


class Leafwise(Optimizer):
    """A gradient transformation that can be part of one pass."""

    part: Part | None = None


def leafwise(part: Part) -> Leafwise:
    """The gradient transformation that runs `part`. Updates have the dtypes of `numerics.update_dtype`."""
    run = TreePass(part)

    def init(params: optax.Params) -> Any:
        return settle(part.init(params), params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        engine: str | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        return run.update(updates, state, params, engine)

    tx = Leafwise(init, update)
    tx.part = part
    tx.take = lambda grads, state, params, engine, _: run.step(grads, state, params, engine)
    return tx


class TreePass:
    """A part, run over a tree."""

    def __init__(self, part: Part, *, rounded: bool = True) -> None:
        """Of `part`; updates are rounded once, to `numerics.update_dtype`, or not below float32."""
        self.part = part
        self.rounded = rounded and part.weights is None
        self.to_updates, self.to_weights = (
            LeafStep(
                functools.partial(self._step_leaf, part.step),
                ends_with_weights=ends_with_weights,
                to_weights=part.to_weights and functools.partial(self._step_leaf, part.to_weights),
                block=part.block,
                in_slices=part.in_slices,
                few_bits=part.few_bits,
                elementwise=part.elementwise,
                closes_over=closed_over(part),
            )
            for ends_with_weights in (False, True)
        )

    def __reduce__(self) -> Any:
        """It is sent to another process without what was compiled in this one."""
        return _tree_pass, (self.part, self.rounded)

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None, engine: str | None = None
    ) -> tuple[optax.Updates, Any]:
        """``(updates, state)``; `engine` is one of `adamite.engines.ENGINES`, None: the one that is asked for here."""
        engine = engines.asked() if engine is None else checks.one_of("engine", engine, engines.ENGINES)
        return self._run(self.to_updates, updates, state, params, engine, updates)

    def step(
        self, updates: optax.Updates, state: Any, params: optax.Params, engine: str, like: optax.Updates | None = None
    ) -> tuple[optax.Params, Any]:
        """``(params, state)``. Updates are rounded as those of the gradients `like` are; None: as their own."""
        return self._run(self.to_weights, updates, state, params, engine, updates if like is None else like)

    def _run(self, step: LeafStep, updates: Any, state: Any, params: Any, engine: str, like: Any) -> tuple[Any, Any]:
        # Open.
        scalars, columns = self.part.begin(updates, state, params)
        columns = jax.tree.map(lambda x: as_array(x) if isinstance(x, np.ndarray) else x, columns)
        checks.differentiable(updates, "updates")
        gradients, structure = jax.tree.flatten(updates, is_leaf=is_none)
        weights = [None] * len(gradients) if params is None else counterparts(updates, params, "params")
        # Step each leaf. Where there is no gradient, a parameter and its moments stay.
        results: list[Any] = list(zip(weights if step.ends_with_weights else gradients, columns, strict=True))
        told = engines.told_shardings()
        rows = zip(gradients, weights, columns, jax.tree.leaves(like, is_leaf=is_none), _paths(updates), strict=True)
        leaves = [
            Leaf(
                number,
                as_array(g),
                None if p is None else as_array(p),
                stored,
                self.rounded_to(step, g_like, p),
                sharding=None if told is None else told.get(path),
                path=path,
            )
            for number, (g, p, stored, g_like, path) in enumerate(rows)
            if g is not None
        ]
        for leaf, result in zip(leaves, engines.run(engine, step, scalars, leaves), strict=True):
            results[leaf.number] = result
        # Close.
        new = self.part.end(state, [stored for _, stored in results], structure)
        return structure.unflatten([first for first, _ in results]), new

    def rounded_to(self, step: LeafStep, g: Any, p: Any) -> Any:
        """The dtype that the update of a leaf is rounded to."""
        dtype = update_dtype(g, p)
        exact = self.part.weights is not None or not (self.rounded or step.ends_with_weights)
        return wide_dtype(dtype) if exact else dtype

    def _step_leaf(
        self,
        step: Callable[..., Any],
        scalars: Any,
        number: Any,
        index: Callable[[], jax.Array],
        g: Any,
        p: Any,
        stored: Any,
    ) -> tuple[jax.Array, Any]:
        p = widen(p) if p is not None and self.part.weights is None else p
        return step(scalars, widen(g), p, stored, lambda key: random_bits(fold(key, number), index()))


def _paths(updates: Any) -> list[str]:
    """The path of each leaf, None being one, where anybody wants to know them: else ""."""
    if engines.told_shardings() is None and not engines.is_recording():
        return [""] * len(jax.tree.leaves(updates, is_leaf=is_none))
    return [keystr(path) for path, _ in leaves_with_path(updates, is_leaf=is_none)]


def _tree_pass(part: Part, rounded: bool) -> TreePass:
    return TreePass(part, rounded=rounded)
