"""A rule, run over a tree one leaf after the other: decode -> step -> encode.

Under jit XLA fuses what belongs to a leaf and, where the state is donated, writes it in place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamite import checks
from adamite.engine.matching import counterparts, same_shapes
from adamite.engine.placement import beside, settle
from adamite.numerics import as_array, cast, is_none, widen
from adamite.storage import Storage

Step = Callable[..., tuple[jax.Array, ...]]
"""``step(g, *moments) -> (direction, *moments)``: elementwise, on arrays of one shape and of at least float32."""

Rule = Callable[[jax.Array], Step]
"""``rule(t) -> step``. What depends on the step number t = 1, 2, ... (int32, shape ()) alone is computed in ``rule``,
once a step; what depends on the gradient in ``step``, once a leaf."""


def from_rule(
    rule: Rule, state_class: type[Any], storages: Mapping[str, Storage]
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that runs `rule` over a tree of parameters.

    Args:
        rule: the algorithm.
        state_class: a NamedTuple of ``count`` and one field for each moment.
        storages: how each moment is kept, by its field's name, in the order in which the rule takes them.
    """

    def init(params: optax.Params) -> Any:
        checks.differentiable(params, "params")
        moments = {name: jax.tree.map(lambda p, s=s: _fresh(s, p), params) for name, s in storages.items()}
        return settle(state_class(count=jnp.zeros((), jnp.int32), **moments), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if not isinstance(state, state_class):
            raise TypeError(f"state must be a {state_class.__name__}, got {type(state).__name__}")
        checks.differentiable(updates, "updates")
        if params is not None:
            same_shapes(updates, counterparts(updates, params, "params"), "params")
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        stored = [counterparts(updates, getattr(state, name), name) for name in storages]
        moments = [
            [None if x is None else storage.decode(x) for x in column]
            for storage, column in zip(storages.values(), stored, strict=True)
        ]
        for name, column in zip(storages, moments, strict=True):
            same_shapes(updates, column, name)

        count = optax.safe_increment(state.count)
        step = rule(count)
        directions = list[Any](leaves)
        for index, leaf in enumerate(leaves):
            if leaf is not None:
                g = as_array(leaf)
                u, *new = step(widen(g), *(column[index] for column in moments))
                directions[index] = cast(u, g.dtype)
                for storage, column, x in zip(storages.values(), stored, new, strict=True):
                    column[index] = storage.encode(x, column[index])
        fields = {name: structure.unflatten(column) for name, column in zip(storages, stored, strict=True)}
        return structure.unflatten(directions), state_class(count=count, **fields)

    return optax.GradientTransformationExtraArgs(init, update)


def _fresh(storage: Storage, param: Any) -> Any:
    leaf = param if isinstance(param, jax.ShapeDtypeStruct) else as_array(param)
    return beside(leaf, storage.zeros(leaf))
