"""A rule, run over a tree one leaf after the other: decode -> step -> encode.

Under jit XLA fuses what belongs to a leaf and, where the state is donated, writes it in place.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import KeyPath, tree_map_with_path

from adamite import checks
from adamite.engine.matching import counterparts
from adamite.engine.placement import beside, settle
from adamite.numerics import as_array, cast, is_none, widen
from adamite.storage import Storage


class Rule(NamedTuple):
    """One step of an algorithm, as pure functions that know no storage, tree, device or dtype."""

    scalars: Callable[..., tuple[jax.typing.ArrayLike, ...]]
    """``scalars(t)``: what depends on the step number t = 1, 2, ... (int32, shape ()) alone, computed once a step. It
    takes as many numbers as the state has counts: mostly one."""

    step: Callable[..., tuple[jax.Array, ...]]
    """``step(scalars, g, *moments) -> (direction, *moments)``, on arrays of at least float32 and
    of the shape of g, or of that which the moment's storage keeps."""

    elementwise: bool = True
    """Whether an element of the results depends on the same element of the arguments alone."""


def from_rule(
    rule: Rule, state_class: type[Any], storages: Mapping[str, Storage]
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that runs `rule` over a tree of parameters.

    Args:
        rule: the algorithm.
        state_class: a NamedTuple with one field for each moment; all other fields are counts of steps.
        storages: how each moment is kept, by its field's name, in the order in which the rule takes them.
    """
    kept = tuple(storages.values())
    count_names = [name for name in state_class._fields if name not in storages]
    traced_once = functools.cache(lambda: jax.jit(rule.step))

    def init(params: optax.Params) -> Any:
        checks.differentiable(params, "params")
        moments = {name: tree_map_with_path(functools.partial(_fresh, s), params) for name, s in storages.items()}
        counts = {name: jnp.zeros((), jnp.int32) for name in count_names}
        return settle(state_class(**counts, **moments), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if not isinstance(state, state_class):
            raise TypeError(f"state must be a {state_class.__name__}, got {type(state).__name__}")
        checks.differentiable(updates, "updates")
        if params is not None:
            counterparts(updates, params, "params")
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        columns = [counterparts(updates, getattr(state, name), name, s.shape, s.fits) for name, s in storages.items()]

        counts = {name: optax.safe_increment(getattr(state, name)) for name in count_names}
        scalars = rule.scalars(*counts.values())
        step = traced_once() if _worth_tracing_once(updates) else rule.step

        def one(g: Any, *stored: Any) -> tuple[Any, ...]:
            if g is None:
                return None, *stored
            g = as_array(g)
            u, *moments = step(scalars, widen(g), *(s.decode(x) for s, x in zip(kept, stored, strict=True)))
            return cast(u, g.dtype), *(s.encode(m, x) for s, m, x in zip(kept, moments, stored, strict=True))

        rows = [one(g, *stored) for g, *stored in zip(leaves, *columns, strict=True)]
        directions, *moments = ([row[i] for row in rows] for i in range(1 + len(kept)))
        fields = {name: structure.unflatten(column) for name, column in zip(storages, moments, strict=True)}
        return structure.unflatten(directions), state_class(**counts, **fields)

    return optax.GradientTransformationExtraArgs(init, update)


def _fresh(storage: Storage, path: KeyPath, param: Any) -> Any:
    leaf = param if isinstance(param, jax.ShapeDtypeStruct) else as_array(param)
    return beside(leaf, storage.fresh(leaf, path))


def _worth_tracing_once(updates: Any) -> bool:
    """Whether a jitted step, which is traced once a shape, spares tracing: where a shape recurs under jit."""
    leaves = jax.tree.leaves(updates)
    return any(isinstance(g, Tracer) for g in leaves) and len({jnp.shape(g) for g in leaves}) < len(leaves)
