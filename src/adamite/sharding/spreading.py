"""ZeRO-1: the state of an optimizer spread over the devices that share its work.

Devices that train one set of parameters on different data all keep the same state. ZeRO-1 leaves each of them a part:

    g         <-  the sum of all devices' gradients, each keeping its part      reduce-scatter
    u, state  <-  update(g, state, p)                                           each its part
    u         <-  the parts put together                                        all-gather

These two move the bytes of the all-reduce that they replace. Nothing is computed here: arrays are told where to live,
and XLA puts in the rest.

Rajbhandari, Rasley, Ruwase & He 2020, arXiv:1910.02054, section 5.1 (P_os).
"""

from typing import Any

import optax
from jax.sharding import AbstractMesh, Mesh

from adamite.identity import described
from adamite.sharding.laying import laid
from adamite.sharding.layout import Spread


@described
def zero1(
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    axis: str | tuple[str, ...] = "data",
    *,
    param_shardings: Any = None,
) -> Spread:
    """Spread the state of a transformation over an axis of the mesh: each device keeps, and steps, its part of it.

    For each parameter the axis goes to the first dimension that no other axis shards and that it divides; if there is
    none, to the first that it divides further. Parameters that it does not divide, and those that it shards already,
    keep their state beside them: `state_shardings` and `adamite.memory_report` tell which. Gradients come in summed
    over the axis, as `jax.grad` of a loss over the whole batch gives them; updates come back sharded as the parameters.

    The results are those of `tx`, bit for bit where it treats every element by itself; norms are still over all of a
    leaf, or of all leaves. It is for jit, and the outermost of transformations; not for pmap or inside of shard_map,
    where arrays are each device's own. A state of another mesh is laid anew by the first step.

    Args:
        tx: any gradient transformation whose state belongs to parameters, of adamite or of optax.
        mesh: the mesh on which the parameters are, its axes all Auto or all Explicit; abstract for a plan.
        axis: the name of the axis over which the batch is sharded, or several.
        param_shardings: tree of `NamedSharding`, or a prefix of one. None: on a mesh of Explicit axes those of the
            parameters; on one of Auto axes parameters are on every device, as jit does not show how they are sharded.

    Returns:
        The transformation. Its state is that of `tx`.

    Raises:
        ValueError: the mesh has no such axis, or axes of both types; `tx` is such a transformation already, or of
            `offload`; at init or update, a parameter is not on this mesh, is sharded and nothing says so to jit, or
            otherwise than `param_shardings` says; on Explicit axes there are neither `params` nor `param_shardings`.
        TypeError: `tx` is no gradient transformation; an argument is the wrong kind of thing.

    Example:
        One line, for a model on a mesh ``("data",)``:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from adamite import adamw
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec()))
        >>> tx = zero1(adamw(1e-3), mesh)
        >>> state = tx.init(params)
        >>> updates, state = jax.jit(tx.update)(jnp.ones_like(params), state, params)
        >>> state[0].mu.sharding.spec, updates.sharding.spec
        (P('data', None), P(None, None))
    """
    names = _axes(mesh, axis)
    return laid("zero1", tx, mesh, names, param_shardings)


def _axes(mesh: Any, axis: Any) -> tuple[str, ...]:
    """The names of the axes, all of the mesh."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r:.80} of type {type(mesh).__name__}")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(f"mesh must have axes of one type, all Auto or all Explicit, got {mesh.axis_types}")
    names = axis if isinstance(axis, tuple) else (axis,)
    if not names or any(name not in mesh.axis_names for name in names) or len(set(names)) < len(names):
        allowed = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"axis must be one of {allowed}, or several, each once, got {axis!r:.80}")
    return names
