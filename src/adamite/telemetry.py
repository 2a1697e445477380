"""What an optimizer does while it trains, as numbers for a log.

Of each group of parameters (each leaf, unless told otherwise) and of all together, after each step:

    gradient_norm         ||g||
    update_norm           ||u||
    parameter_norm        ||p||, before the step
    update_ratio          ||u|| / ||p||: 1e-3 is usual; 1e-5 hardly learns
    mu_norm               ||m||; so for every mean of gradients that the optimizer keeps
    sqrt_nu_norm          ||sqrt(v)||; so for every mean of squares
    epsilon_share         the share of elements with sqrt(v_hat) < eps: there eps decides how long a step is

and once for all: learning_rate, the counts of guards (skipped, consecutive, gave_up) and of accumulation (dropped), and
what `optax.inject_hyperparams` injects. Norms are Euclidean and computed in float32.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr, tree_flatten_with_path

from adamite import checks
from adamite.accumulate import AccumulateState
from adamite.convert import UNSIGNED, decoded
from adamite.engine.optimizer import Optimizer, optimizer
from adamite.engine.ownership import owned
from adamite.engine.placement import settle
from adamite.guards import SkipState
from adamite.identity import described, identity
from adamite.numerics import abs_sq, is_none, over_devices, power, widen

Record = dict[str, dict[str, jax.Array]]
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class TelemetryState(NamedTuple):
    """State of `with_telemetry`."""

    record: Any  # float32 scalars, by quantity and group; "" is all parameters
    inner: Any  # the state of what is watched


TELLING = (TelemetryState, SkipState, AccumulateState, *INJECTED)


@described
def with_telemetry(
    tx: optax.GradientTransformation,
    *,
    group: Callable[[KeyPath], str] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Watch an optimizer: after each step its state holds the numbers that `telemetry` reads. Nothing else changes.

    Args:
        tx: any gradient transformation: the whole optimizer. The learning rate and epsilon are known of those of
            adamite, the moments of optax's, too.
        group: a function from a parameter's path, as `jax.tree_util.tree_flatten_with_path` gives it, to the name of
            its group. None: each leaf is one, named by its path.
        axis_name: see `adamite.skip_nonfinite`: norms are then of all devices' parts together.

    Returns:
        The transformation. Its state is a `TelemetryState`. It reads gradients, updates, parameters and moments once
        more.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing.

    Example:
        >>> from adamite import adam
        >>> tx, params = with_telemetry(adam(0.1)), {"w": jnp.ones(4), "b": jnp.zeros(1)}
        >>> g = {"w": jnp.full(4, 3.0), "b": jnp.zeros(1)}
        >>> _, state = tx.update(g, tx.init(params), params)
        >>> for name, value in telemetry(state).items():
        ...     if not name.endswith("/w"):
        ...         print(name, round(value, 3))
        epsilon_share 0.2
        epsilon_share/b 1.0
        gradient_norm 6.0
        gradient_norm/b 0.0
        learning_rate 0.1
        mu_norm 0.6
        mu_norm/b 0.0
        parameter_norm 2.0
        parameter_norm/b 0.0
        sqrt_nu_norm 0.19
        sqrt_nu_norm/b 0.0
        update_norm 0.2
        update_norm/b 0.0
        update_ratio 0.1
        update_ratio/b nan
    """
    inner = optax.with_extra_args_support(checks.transformation("tx", tx))
    name_of = _path_name if group is None else checks.function("group", group)
    axes, known = checks.axis_name(axis_name), _arguments(identity(tx))

    def summed(column: list[Any], groups: list[str], axes: tuple[str, ...]) -> dict[str, jax.Array]:
        """The sum of all arrays of each group, and of all; NaN where there are none."""
        sums: dict[str, Any] = {}
        for name, x in zip(groups, column, strict=True):
            if x is not None:
                total = over_devices(jnp.sum(x), x, axes)
                sums |= {key: sums.get(key, 0) + total for key in {"", name}}
        return {key: jnp.float32(sums.get(key, jnp.nan)) for key in ("", *groups)}

    def measure(axes: tuple[str, ...], gradients: Any, updates: Any, params: Any, before: Any, state: Any) -> Record:
        paths, structure = tree_flatten_with_path(gradients, is_leaf=is_none)
        groups = [name_of(path) for path, _ in paths]
        unknown = [None] * len(groups)
        moments: dict[str, list[Any]] = {}
        for array, fields, owner in owned(decoded(state), structure):
            if owner is not None and fields and fields[-1] in UNSIGNED:
                moments.setdefault(fields[-1], [*unknown])[owner] = array
        squares = {
            "gradient_norm": [_square(g) for _, g in paths],
            "update_norm": [_square(u) for u in structure.flatten_up_to(updates)],
            "parameter_norm": unknown if params is None else [_square(p) for p in structure.flatten_up_to(params)],
        }
        for name, column in moments.items():
            squares[f"sqrt_{name}_norm" if UNSIGNED[name] else f"{name}_norm"] = [
                m if m is None or UNSIGNED[name] else _square(m) for m in column
            ]
        record = {name: jax.tree.map(jnp.sqrt, summed(column, groups, axes)) for name, column in squares.items()}
        if "nu" in moments and "eps" in known:
            threshold = _smallest(known, state)
            small = [None if v is None else (v < threshold).astype(jnp.float32) for v in moments["nu"]]
            sizes = [None if v is None else jnp.ones_like(v) for v in moments["nu"]]
            record["epsilon_share"] = jax.tree.map(jnp.divide, summed(small, groups, axes), summed(sizes, groups, axes))
        rate = known.get("learning_rate")
        if rate is not None:
            rate = (
                rate(_count(before, lambda node: isinstance(node, optax.ScaleByScheduleState)))
                if callable(rate)
                else rate
            )
            record["learning_rate"] = {"": jnp.asarray(rate, jnp.float32)}
        return record

    def init(params: optax.Params) -> TelemetryState:
        state = inner.init(params)
        record = jax.eval_shape(functools.partial(measure, ()), params, params, params, state, state)
        return settle(TelemetryState(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), record), state), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TelemetryState]:
        if not isinstance(state, TelemetryState):
            raise TypeError(f"state must be a TelemetryState, got {type(state).__name__}")
        new, kept = inner.update(updates, state.inner, params, **extra_args)
        return new, TelemetryState(measure(axes, updates, new, params, state.inner, kept), kept)

    return optimizer(init, update)


def telemetry(state: optax.OptState) -> dict[str, float]:
    """The numbers that an optimizer's state holds for a log, by name: ``update_norm/layer/w``, ``update_norm`` of all.

    Args:
        state: of an optimizer with `with_telemetry` in it; or with guards, `accumulate` or `optax.inject_hyperparams`
            alone, whose numbers it gives. Its arrays are fetched from the device, which waits for the step.

    Returns:
        A flat dict of Python numbers, for a CSV file, TensorBoard or any other logger.

    Raises:
        ValueError: there is nothing to tell in the state.

    Example:
        >>> from adamite import adam, skip_nonfinite
        >>> tx = skip_nonfinite(adam(0.1))
        >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
        >>> telemetry(state)
        {'consecutive': 1, 'gave_up': False, 'skipped': 1}
    """
    found: dict[str, Any] = {}
    for node in _nodes(state):
        if isinstance(node, TelemetryState):
            found |= _flat(jax.device_get(node.record))
        elif isinstance(node, AccumulateState):
            found["dropped"] = node.dropped
        elif isinstance(node, SkipState):
            found |= {name: getattr(node, name) for name in ("skipped", "consecutive", "gave_up")}
        else:
            found |= {name: x for name, x in node.hyperparams.items() if jnp.ndim(x) == 0}
    if not found:
        raise ValueError(f"state must hold something to tell, such as a TelemetryState, got {type(state).__name__}")
    return {name: x.item() for name, x in jax.device_get(found).items()}


def _flat(record: Record) -> dict[str, Any]:
    of_updates, of_parameters = record["update_norm"], record["parameter_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {group: np.divide(of_updates[group], of_parameters[group]) for group in of_updates}
    found = sorted((record | {"update_ratio": ratios}).items())
    return {f"{name}/{group}".removesuffix("/"): x for name, groups in found for group, x in groups.items()}


def _nodes(state: Any) -> Iterator[Any]:
    """The states in it that have something to tell, the outer ones first."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TELLING)):
        if isinstance(node, TELLING):
            yield node
            yield from _nodes(tuple(node))


def _path_name(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/")


def _arguments(of: Any) -> dict[str, Any]:
    """All arguments in an identity, nested or not; of two of a name the outer, then the first."""
    nested = of.values() if isinstance(of, dict) else of if isinstance(of, tuple) else ()
    found = dict(of) if isinstance(of, dict) else {}
    for value in nested:
        found = _arguments(value) | found
    return found


def _square(x: Any) -> Any:
    return None if x is None else abs_sq(widen(x))


def _count(state: Any, tells: Callable[[Any], bool]) -> Any:
    """The count of the first state of a kind."""
    nodes = jax.tree.leaves(state, is_leaf=tells)
    return next((node.count for node in nodes if tells(node)), 0)


def _smallest(known: dict[str, Any], state: Any) -> Any:
    """Of mean squares: below it eps is more than the root."""
    eps, b2 = jnp.float32(known["eps"]), known.get("b2")
    if b2 is None or not known.get("bias_correction", True):
        return eps**2
    return eps**2 * jnp.float32(
        1 - power(b2, _count(state, lambda node: hasattr(node, "nu") and hasattr(node, "count")))
    )
