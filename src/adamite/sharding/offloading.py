"""State that waits in the host's memory while gradients are computed."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from adamite import checks
from adamite.core.ownership import owned
from adamite.core.placement import settle
from adamite.identity import described
from adamite.numerics import is_none
from adamite.sharding.layout import Spread, spread_by


@described
def offload(tx: optax.GradientTransformation) -> Spread:
    """Keep the state in the host's memory between steps: experimental.

    Arrays that belong to a parameter, moments above all, are fetched before a step and sent back behind it, as they are
    sharded; step counts stay. The results are those of `tx`, bit for bit. During the step the state is on the device,
    as far as the compiler does not fetch it piece by piece; what it takes each step is twice the state's bytes between
    host and device. On a CPU the two are one memory, and nothing is gained. Parameters that are committed to no device
    become so with the first step, which then compiles twice: `jax.device_put` them before.

    Args:
        tx: any gradient transformation whose state belongs to parameters, of adamite or of optax; `zero1` inside.

    Returns:
        The transformation. Its state is that of `tx`, with memory kind ``pinned_host``.

    Raises:
        TypeError: `tx` is no gradient transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> tx, params = offload(adam(1e-3)), jnp.ones(3)
        >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        >>> state[0].mu.sharding.memory_kind
        'pinned_host'
    """
    inner = optax.with_extra_args_support(checks.transformation("tx", tx))

    def put(state: optax.OptState, structure: Any, space: Any) -> optax.OptState:
        arrays = [x if owner is None else jax.device_put(x, space) for x, _, owner in owned(state, structure)]
        return jax.tree.structure(state).unflatten(arrays)

    def init(params: optax.Params) -> optax.OptState:
        return put(settle(inner.init(params), params), jax.tree.structure(params), jax.memory.Space.Host)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        structure = jax.tree.structure(updates, is_leaf=is_none)
        here = put(state, structure, jax.memory.Space.Device)
        updates, state = inner.update(updates, here, params, **extra_args)
        return updates, put(state, structure, jax.memory.Space.Host)

    def spread(leaves: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        return [s and s.with_memory_kind("pinned_host") for s in spread_by(tx, leaves, shardings)]

    offloading = Spread(init, update)
    offloading.spread = spread
    return offloading
