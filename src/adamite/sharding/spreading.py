"""ZeRO-1: the state of an optimizer spread over the devices that share its work.

Devices that train one set of parameters on different data all keep the same state. ZeRO-1 leaves each of them a part:

    g         <-  the sum of all devices' gradients, each keeping its part      reduce-scatter
    u, state  <-  update(g, state, p)                                           each its part
    u         <-  the parts put together                                        all-gather

These two move the bytes of the all-reduce that they replace. Nothing is computed here: arrays are told where to live,
and XLA puts in the rest.

Rajbhandari, Rasley, Ruwase & He 2020, arXiv:1910.02054, section 5.1 (P_os).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from adamite import checks
from adamite.core.matching import counterparts, shape_of
from adamite.core.optimizer import as_optimizer
from adamite.core.tree_pass import Leafwise
from adamite.identity import described
from adamite.numerics import is_none, is_traced
from adamite.paths import leaves_with_path
from adamite.sharding.layout import Spread, of_params, of_state, with_axes


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

        >>> import jax.numpy as jnp
        >>> from adamite import adamw
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec()))
        >>> tx = zero1(adamw(1e-3), mesh)
        >>> state = tx.init(params)
        >>> updates, state = jax.jit(tx.update)(jnp.ones_like(params), state, params)
        >>> state[0].mu.sharding.spec, updates.sharding.spec
        (P('data', None), P(None, None))
    """
    if isinstance(checks.transformation("tx", tx), Spread):
        raise ValueError("tx must keep its state beside the parameters: give all axes to one zero1, offload around it")
    inner = as_optimizer(tx)
    names = _axes(mesh, axis)

    home = NamedSharding(mesh, PartitionSpec())  # of what all devices have

    def spread(leaves: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        for sharding in shardings:
            if sharding is not None and (not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape):
                raise ValueError(f"parameters must be on the mesh of zero1, {dict(mesh.shape)}, got {sharding}")
        return [with_axes(s, shape_of(leaf), names) if s else None for leaf, s in zip(leaves, shardings, strict=True)]

    def layout(params: Any, name: str) -> tuple[list[Any], list[Any]]:
        """The sharding of each parameter, None being one, and that by which its state is sharded."""
        leaves = leaves_with_path(params, is_leaf=is_none)
        told = None if param_shardings is None else iter(of_params(params, param_shardings, "param_shardings"))
        own = []
        for path, leaf in leaves:
            its = None if leaf is None or told is None else next(told)
            own.append(None if leaf is None else _on(mesh, f"{name}{keystr(path)}", leaf, its))
        return own, spread([leaf for _, leaf in leaves], own)

    def lay_state(state: optax.OptState, leaves: list[Any], structure: Any, over: list[Any]) -> optax.OptState:
        """What belongs to a parameter as `over` says, or not at all where that is None; all else everywhere."""
        found = of_state(inner, state, leaves, structure, over)
        absent = {number for number, sharding in enumerate(over) if sharding is None}
        arrays, form = jax.tree.flatten(state)
        return form.unflatten(_lay(arrays, [None if array.owner in absent else s or home for array, s in found]))

    def init(params: optax.Params) -> optax.OptState:
        leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
        _, over = layout(params, "params")
        return lay_state(inner.init(structure.unflatten(_lay(leaves, over))), leaves, structure, over)

    def part(
        take: Callable[..., Any], updates: Any, state: Any, params: Any, extra_args: Any, *, told: bool = False
    ) -> tuple[Any, optax.OptState]:
        """Each device's part of an update or a whole step, and its results, put together as the parameters are."""
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        if params is None and param_shardings is None and AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                "zero1 needs params on a mesh of Explicit axes, to shard the updates as they are: "
                "call update(updates, state, params), or give it param_shardings"
            )
        weights = leaves if params is None else counterparts(updates, params, "params")
        own, over = layout(structure.unflatten(weights), "updates" if params is None else "params")
        if params is not None:
            params = structure.unflatten(_lay(weights, over))
        if told:
            of_updates = [s for x, s in zip(leaves, over, strict=True) if x is not None]
            of_moments = [s or home for _, s in of_state(inner, state, weights, structure, over)]
            take = _told(take, mesh, [*of_updates, *of_moments, *(s for s in over if s)])
        new, state = take(structure.unflatten(_lay(leaves, over)), state, params, **extra_args)
        return structure.unflatten(_lay(structure.flatten_up_to(new), own)), lay_state(state, weights, structure, over)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return part(inner.update, updates, state, params, extra_args)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, optax.OptState]:
        told = AxisType.Auto in mesh.axis_types and isinstance(inner, Leafwise)  # others may not bear Explicit axes
        return part(functools.partial(inner.step, engine=engine), grads, state, params, extra_args, told=told)

    spreading = Spread(init, update)
    spreading.spread, spreading.take = spread, take
    return spreading


def _told(step: Callable[..., Any], mesh: Any, shardings: Sequence[NamedSharding]) -> Callable[..., Any]:
    """A step for jit on Auto axes that is told how its arrays are sharded, as kernels have to know."""

    def told(*trees: Any, **extra_args: Any) -> Any:
        arrays, form = jax.tree.flatten(trees)
        if not any(is_traced(x) for x in arrays):
            return step(*trees, **extra_args)
        on_explicit_axes = jax.sharding.explicit_axes(
            lambda *arrays: step(*form.unflatten(arrays), **extra_args),
            in_sharding=tuple(s.spec for s in shardings),
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return on_explicit_axes(*arrays)

    return told


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


def _on(mesh: Any, path: str, leaf: Any, given: Any) -> NamedSharding:
    """The parameter's sharding over the mesh."""
    shown: Any = getattr(leaf, "sharding", None)
    if is_traced(leaf):
        shown = jax.typeof(leaf).sharding
        if AxisType.Manual in shown.mesh.axis_types:
            raise ValueError(f"{path} is one device's own, inside of shard_map or pmap: zero1 is for jit")
        shown = shown if AxisType.Explicit in shown.mesh.axis_types else None
        if shown is None and given is None:
            return NamedSharding(mesh, PartitionSpec())
    elif isinstance(leaf, jax.Array) and isinstance(mesh, AbstractMesh):
        raise ValueError(f"{path} is an array, but the mesh of zero1 is abstract, {dict(mesh.shape)}: it is for a plan")
    if given is None:
        own = _on_mesh(mesh, path, shown)
        if AxisType.Auto in mesh.axis_types and not own.is_fully_replicated:
            raise ValueError(
                f"{path} is sharded as {own.spec} over Auto axes, which jit does not show: "
                "zero1 needs param_shardings=jax.tree.map(lambda p: p.sharding, params)"
            )
        return NamedSharding(mesh, own.spec)
    told = NamedSharding(mesh, _on_mesh(mesh, f"param_shardings for {path}", given).spec)
    if shown is not None:
        own = _on_mesh(mesh, path, shown)
        if not NamedSharding(mesh, own.spec).is_equivalent_to(told, len(shape_of(leaf))):
            raise ValueError(f"{path} is sharded as {own.spec}, but param_shardings says {told.spec}")
    return told


def _on_mesh(mesh: Any, path: str, sharding: Any) -> NamedSharding:
    """The sharding; refused where it is elsewhere."""
    where = f"the mesh {dict(sharding.mesh.shape)}" if isinstance(sharding, NamedSharding) else "no mesh"
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape:
        raise ValueError(
            f"{path} is on {where}, and not on that of zero1, {dict(mesh.shape)}: put it there before init, "
            "as jax.device_put(params, NamedSharding(mesh, PartitionSpec())) does"
        )
    if isinstance(mesh, Mesh) and isinstance(sharding.mesh, Mesh):
        theirs, ours = ([device.id for device in devices.flat] for devices in (sharding.mesh.devices, mesh.devices))
        if theirs != ours:
            raise ValueError(f"{path} is on the devices {theirs}, and the mesh of zero1 has {ours}, in this order")
    return sharding


def _lay(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Each array where its sharding says, eagerly and under jit; those without one as they are."""

    def lay(x: Any, sharding: Any) -> Any:
        if x is None or sharding is None:
            return x
        if not is_traced(x):
            return jax.device_put(x, sharding)
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(x, sharding)

    return [lay(x, sharding) for x, sharding in zip(arrays, shardings, strict=True)]
