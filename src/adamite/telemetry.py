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
what `optax.inject_hyperparams` injects. Inside of `optax.partition` each of these ends with the group's label, as in
learning_rate/decayed. Norms are Euclidean and computed in float32. What is not known is left out, or NaN where only
some groups have it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr

from adamite import checks
from adamite.accumulate import AccumulateState
from adamite.convert import UNSIGNED, decoded
from adamite.engine.optimizer import Optimizer, as_optimizer, optimizer
from adamite.engine.ownership import owned
from adamite.engine.placement import settle
from adamite.engine.rates import INJECTED, RatesOf, labels
from adamite.engine.skipping import step_if
from adamite.engine.trials import begun_after, in_blocks
from adamite.guards import SkipState, sum_of_squares
from adamite.identity import described, identity
from adamite.numerics import is_none, over_devices, power
from adamite.paths import leaves_with_path, unwrapped

Record = dict[str, dict[str, jax.Array]]

UNKNOWN = -1.0
"""What a record holds for a group without arrays. A NaN there would be an error to `jax.debug_nans`."""


class TelemetryState(NamedTuple):
    """State of `with_telemetry`."""

    record: Any  # float32 scalars, by quantity and group; "" is all parameters
    inner: Any  # the state of what is watched
    count: Any = ()  # int32, shape (): steps since the last that was measured, in [0, every); () if each one is


TELLING = (TelemetryState, SkipState, AccumulateState, *INJECTED)


@described
def with_telemetry(
    tx: optax.GradientTransformation,
    *,
    every: int = 1,
    group: Callable[[KeyPath], str] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Watch an optimizer: its state holds the numbers that `telemetry` reads. Nothing else changes.

    To measure takes longer than most steps. With ``every=100`` the steps 100, 200, ... are measured, and the record
    stays as it is in between: zeros before the first. Such a step is tried once, to be measured, and then taken; under
    jit the trial is a branch, and the steps between cost what they cost without telemetry. ``tx.step`` always does so,
    for the engine that takes the step computes no update: the update that is measured is that of ``tx.update``.

    Args:
        tx: any gradient transformation: the whole optimizer. The learning rate is known of optimizers of adamite
            anywhere inside, epsilon of those of adamite, the moments of optax's, too.
        every: a whole number >= 1, in steps: how often to measure.
        group: a function from a parameter's path, as `jax.tree_util` gives it, without Flax's ``.value``, to the name
            of its group. None: each leaf is one, named by its path.
        axis_name: see `adamite.skip_nonfinite`: norms are then of all devices' parts together.

    Returns:
        The transformation. Its state is a `TelemetryState`. A step that is measured reads gradients, updates,
        parameters and moments once more.

    Raises:
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing; at update, the state is
            that of another `every`.
        ValueError: `every` is < 1.

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
    inner = as_optimizer(checks.transformation("tx", tx))
    every, axes = checks.whole("every", every, lowest=1), checks.axis_name(axis_name)
    name_of = _path_name if group is None else checks.function("group", group)
    known = _arguments(identity(tx))
    rates = RatesOf(inner.init)

    def measure(axes: tuple[str, ...], gradients: Any, updates: Any, params: Any, before: Any, state: Any) -> Record:
        paths, structure = leaves_with_path(gradients, is_none), jax.tree.structure(gradients, is_leaf=is_none)
        groups = [name_of(path) for path, _ in paths]
        unknown = [None] * len(groups)

        def sums(column: list[Any], one: Callable[..., Any] = sum_of_squares) -> list[Any]:
            return [None if x is None else one(x, axes) for x in column]

        def moving(tree: Any) -> list[Any]:
            """What stands where there is a gradient: elsewhere, `params` may hold anything."""
            return [None if g is None else x for (_, g), x in zip(paths, structure.flatten_up_to(tree), strict=True)]

        totals = {
            "gradient_norm": sums([g for _, g in paths]),
            "update_norm": sums(moving(updates)),
            "parameter_norm": sums(unknown if params is None else moving(params)),
        }
        moments: dict[str, list[Any]] = {}
        for array, fields, owner in owned(decoded(state), structure):
            if owner is not None and fields and fields[-1] in UNSIGNED:
                moments.setdefault(fields[-1], [*unknown])[owner] = array
        for name, column in moments.items():
            totals |= {f"sqrt_{name}_norm": sums(column, _sum)} if UNSIGNED[name] else {f"{name}_norm": sums(column)}
        record = {name: _grouped(groups, column, jnp.sqrt) for name, column in totals.items()}
        if "nu" in moments and "eps" in known:
            threshold = _smallest(known, state)
            small = sums(moments["nu"], lambda v, axes: _sum((v < threshold).astype(jnp.float32), axes))
            sizes = sums(moments["nu"], lambda v, axes: over_devices(float(v.size), v, axes))
            record["epsilon_share"] = _grouped(groups, small, lambda part, whole: part / jnp.maximum(whole, 1), sizes)
        told = {label: jnp.float32(rate(before)) for label, rate in rates(before, gradients).items()}
        return record | ({"learning_rate": told} if told else {})

    def init(params: optax.Params) -> TelemetryState:
        state = inner.init(params)
        record = jax.eval_shape(functools.partial(measure, ()), params, params, params, state, state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), record)
        return settle(TelemetryState(zeros, state, () if every == 1 else jnp.zeros((), jnp.int32)), params)

    def check(state: Any) -> None:
        if not isinstance(state, TelemetryState):
            raise TypeError(f"state must be a TelemetryState, got {type(state).__name__}")
        if isinstance(state.count, tuple) != (every == 1):
            kind = "every=1, without a count" if every == 1 else f"every={every}, with a count"
            raise TypeError(f"state must be one of with_telemetry with {kind}")

    def recorded(grads: Any, state: TelemetryState, params: Any, extra_args: dict[str, Any]) -> tuple[Record, Any]:
        """The record and the count after a step, which is tried where it is measured."""

        def measured() -> tuple[Record, Any]:
            new, kept = inner.update(grads, state.inner, params, **extra_args)
            return measure(axes, grads, new, params, state.inner, kept), 0 * state.count if every > 1 else ()

        if every == 1:
            return measured()
        return step_if(state.count + 1 >= every, measured, lambda: (state.record, state.count + 1))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TelemetryState]:
        check(state)
        if every == 1:
            new, kept = inner.update(updates, state.inner, params, **extra_args)
            return new, TelemetryState(measure(axes, updates, new, params, state.inner, kept), kept)
        record, count = recorded(updates, state, params, extra_args)
        grads, before = begun_after(count, updates, state.inner, by_count=in_blocks(state.inner))
        new, kept = inner.update(grads, before, params, **extra_args)
        return new, TelemetryState(record, kept, count)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, TelemetryState]:
        check(state)
        record, count = recorded(grads, state, params, extra_args)
        seen = count if every > 1 else {name: record[name] for name in record if name != "learning_rate"}
        grads, before = begun_after(seen, grads, state.inner, by_count=True)
        new, kept = inner.step(grads, before, params, engine=engine, **extra_args)
        return new, TelemetryState(record, kept, count)

    return optimizer(init, update, take)


def telemetry(state: optax.OptState) -> dict[str, Any]:
    """The numbers that an optimizer's state holds for a log, by name: ``update_norm/layer/w``, ``update_norm`` of all.

    Args:
        state: of an optimizer with `with_telemetry` in it; or with guards, `accumulate` or `optax.inject_hyperparams`
            alone, whose numbers it gives. Its arrays are fetched from the device, which waits for the step.

    Returns:
        A flat dict of Python numbers, for a CSV file, TensorBoard or any other logger. Of a state with leading axes, as
        `jax.vmap` and `jax.lax.scan` give it, of NumPy arrays with these axes.

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
    for under, node in _nodes(state):
        if isinstance(node, TelemetryState):
            told = _flat(jax.device_get(node.record))
        elif isinstance(node, AccumulateState):
            told = {"dropped": node.dropped}
        elif isinstance(node, SkipState):
            told = {name: getattr(node, name) for name in ("skipped", "consecutive", "gave_up")}
        else:
            told = {name: x for name, x in node.hyperparams.items() if jnp.shape(x) in ((), jnp.shape(node.count))}
        found |= {"/".join((name, *under)): x for name, x in told.items()}
    if not found:
        raise ValueError(f"state must hold something to tell, such as a TelemetryState, got {type(state).__name__}")
    return {name: x.item() if np.ndim(x) == 0 else np.asarray(x) for name, x in jax.device_get(found).items()}


def _flat(record: Record) -> dict[str, Any]:
    """By name and group; of two norms the ratio, too."""
    known = {
        name: {group: np.where(x == UNKNOWN, np.float32(np.nan), x) for group, x in groups.items()}
        for name, groups in record.items()
    }
    of_updates, of_parameters = known["update_norm"], known["parameter_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {group: np.divide(of_updates[group], of_parameters[group]) for group in of_updates}
    found = sorted((known | {"update_ratio": ratios}).items())
    return {f"{name}/{group}".removesuffix("/"): x for name, groups in found for group, x in groups.items()}


def _grouped(groups: list[str], column: list[Any], one: Callable[..., Any], *others: list[Any]) -> dict[str, jax.Array]:
    """``one`` of the sums of each group and of all together, "", over the leaves that have the number."""
    rows: dict[str, list[Any]] = {name: [] for name in ("", *groups)}
    for group, row in zip(groups, zip(column, *others, strict=True), strict=True):
        if row[0] is not None:
            for name in {"", group}:
                rows[name].append(row)
    sums = {name: [jnp.sum(jnp.stack(of)) for of in zip(*found, strict=True)] for name, found in rows.items()}
    return {name: jnp.float32(one(*of) if of else UNKNOWN) for name, of in sums.items()}


def _sum(x: jax.Array, axes: tuple[str, ...]) -> Any:
    return over_devices(jnp.sum(x), x, axes)


def _nodes(state: Any, under: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The states in it that have something to tell, the outer ones first, with the labels that they are under."""
    for path, node in leaves_with_path(unwrapped(state), lambda x: isinstance(x, TELLING)):
        if isinstance(node, TELLING):
            inside = (*under, *labels(path))
            yield inside, node
            yield from _nodes(tuple(node), inside)


def _path_name(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/")


def _arguments(of: Any) -> dict[str, Any]:
    """All arguments in an identity, nested or not; of two of a name the outer, then the first.

    Those of a partition's groups are no single transformation's.
    """
    nested = of.values() if isinstance(of, dict) else of if isinstance(of, tuple) else ()
    found = dict(of) if isinstance(of, dict) else {}
    for value in () if "transforms" in found else nested:
        found = _arguments(value) | found
    return found


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
