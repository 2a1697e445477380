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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from adamite import checks, engines
from adamite.convert import UNSIGNED, decoded
from adamite.core.norms import by_group, sum_of_squares, total
from adamite.core.optimizer import Optimizer, as_optimizer, optimizer
from adamite.core.ownership import owned
from adamite.core.placement import settle
from adamite.core.rates import RatesOf
from adamite.core.trials import counted_after, tried_if
from adamite.identity import described, identity
from adamite.numerics import is_none, over_devices, power
from adamite.paths import leaves_with_path

Record = dict[str, dict[str, jax.Array]]

UNKNOWN = -1.0
"""What a record holds for a group without arrays. A NaN there would be an error to `jax.debug_nans`."""


class Sampled(NamedTuple):
    """What is known where not every step is measured."""

    numbers: Any  # as the record of a `TelemetryState`: those of the last step that was measured
    count: Any  # int32, shape (): steps since then, in [0, every)


class TelemetryState(NamedTuple):
    """State of `with_telemetry`."""

    record: Any  # float32 scalars, by quantity and group; "" is all parameters; with every > 1 a Sampled of it
    inner: Any  # the state of what is watched


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
        >>> from adamite import adam, telemetry
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
            totals |= {f"sqrt_{name}_norm": sums(column, total)} if UNSIGNED[name] else {f"{name}_norm": sums(column)}
        record = {name: by_group(groups, column, jnp.sqrt, unknown=UNKNOWN) for name, column in totals.items()}
        if "nu" in moments and "eps" in known:
            threshold = _smallest(known, state)
            small = sums(moments["nu"], lambda v, axes: total((v < threshold).astype(jnp.float32), axes))
            sizes = sums(moments["nu"], lambda v, axes: over_devices(float(v.size), v, axes))
            record["epsilon_share"] = by_group(
                groups, small, lambda part, whole: part / jnp.maximum(whole, 1), sizes, unknown=UNKNOWN
            )
        told = {label: jnp.float32(rate(before)) for label, rate in rates(before, gradients).items()}
        return record | ({"learning_rate": told} if told else {})

    def init(params: optax.Params) -> TelemetryState:
        state = inner.init(params)
        record = jax.eval_shape(functools.partial(measure, ()), params, params, params, state, state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), record)
        record = zeros if every == 1 else Sampled(zeros, jnp.zeros((), jnp.int32))
        return settle(TelemetryState(record, state), params)

    def check(state: Any) -> None:
        if not isinstance(state, TelemetryState):
            raise TypeError(f"state must be a TelemetryState, got {type(state).__name__}")
        if isinstance(state.record, Sampled) != (every > 1):
            kind = "every=1, without a count" if every == 1 else f"every={every}, with a count"
            raise TypeError(f"state must be one of with_telemetry with {kind}")

    def tried(grads: Any, state: TelemetryState, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        """The record, of a step that is only tried if it is due to be measured, and the inner state to take it with."""

        def measured() -> Record:
            with engines.asking("xla"):  # which computes the step within what measures it
                new, kept = inner.update(grads, state.inner, params, **extra_args)
            return measure(axes, grads, new, params, state.inner, kept)

        if every == 1:
            record = measured()
            norms = {name: record[name] for name in record if name != "learning_rate"}
            return record, counted_after(norms, state.inner)
        numbers, count = state.record
        record, before = tried_if(
            count + 1 >= every, lambda: (measured(), 0 * count), lambda: (numbers, count + 1), state.inner
        )
        return Sampled(*record), before

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TelemetryState]:
        check(state)
        if every == 1:
            new, kept = inner.update(updates, state.inner, params, **extra_args)
            return new, TelemetryState(measure(axes, updates, new, params, state.inner, kept), kept)
        record, before = tried(updates, state, params, extra_args)
        new, kept = inner.update(updates, before, params, **extra_args)
        return new, TelemetryState(record, kept)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, TelemetryState]:
        check(state)
        record, before = tried(grads, state, params, extra_args)
        new, kept = inner.step(grads, before, params, engine=engine, **extra_args)
        return new, TelemetryState(record, kept)

    return optimizer(init, update, take)


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
