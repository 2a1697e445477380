"""The numbers in an optimizer's state, for a log: of telemetry, guards, accumulation and injected hyperparameters."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamite.accumulate import AccumulateState
from adamite.core.rates import INJECTED, labels
from adamite.guards import SkipState
from adamite.paths import leaves_with_path, unwrapped
from adamite.telemetry import UNKNOWN, Record, Sampled, TelemetryState

TELLING = (TelemetryState, SkipState, AccumulateState, *INJECTED)


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
            record = node.record.numbers if isinstance(node.record, Sampled) else node.record
            told = _flat(jax.device_get(record))
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


def _nodes(state: Any, under: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The states in it that have something to tell, the outer ones first, with the labels that they are under."""
    for path, node in leaves_with_path(unwrapped(state), lambda x: isinstance(x, TELLING)):
        if isinstance(node, TELLING):
            inside = (*under, *labels(path))
            yield inside, node
            yield from _nodes(tuple(node), inside)
