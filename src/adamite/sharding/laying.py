"""A transformation whose gradients, state and updates are laid out over a mesh, before and behind each step.

Nothing is computed here. Arrays are told where to live, and XLA moves them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from adamite import checks, engines
from adamite.core.matching import counterparts, shape_of
from adamite.core.optimizer import as_optimizer
from adamite.numerics import is_none, is_traced
from adamite.paths import leaves_with_path
from adamite.sharding.layout import Spread, of_params, of_state, with_axes


def laid(
    name: str,
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    names: tuple[str, ...],
    param_shardings: Any,
) -> Spread:
    """The transformation `tx` on a mesh, its state sharded over some axes more than the parameters.

    Args:
        name: of the function that makes it, for errors.
        tx: any gradient transformation.
        mesh: the mesh, its axes all Auto or all Explicit.
        names: the axes that shard the state, beside those that shard its parameter.
        param_shardings: tree of `NamedSharding`, or a prefix of one. None: those that the parameters show.
    """
    if isinstance(checks.transformation("tx", tx), Spread):
        raise ValueError(
            "tx must keep its state beside the parameters: give all axes to one zero1, offload around it; "
            "zero1 tells the shardings as placed does"
        )
    inner = as_optimizer(tx)
    home = NamedSharding(mesh, PartitionSpec())  # of what all devices have

    def spread(leaves: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        for sharding in shardings:
            if sharding is not None and (not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape):
                raise ValueError(f"parameters must be on the mesh of {name}, {dict(mesh.shape)}, got {sharding}")
        return [with_axes(s, shape_of(leaf), names) if s else None for leaf, s in zip(leaves, shardings, strict=True)]

    def layout(params: Any, tree: str) -> tuple[list[Any], list[Any]]:
        """The sharding of each parameter, None being one, and that by which its state is sharded."""
        leaves = leaves_with_path(params, is_leaf=is_none)
        given = None if param_shardings is None else iter(of_params(params, param_shardings, "param_shardings"))
        own = []
        for path, leaf in leaves:
            sharding = None if leaf is None or given is None else next(given)
            own.append(None if leaf is None else _on(name, mesh, f"{tree}{keystr(path)}", leaf, sharding))
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
        take: Callable[..., Any], updates: Any, state: Any, params: Any, extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        """Each device's part of an update or a whole step, and its results, put together as the parameters are."""
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        if params is None and param_shardings is None and AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"{name} needs params on a mesh of Explicit axes, to shard the updates as they are: "
                "call update(updates, state, params), or give it param_shardings"
            )
        weights = leaves if params is None else counterparts(updates, params, "params")
        own, over = layout(structure.unflatten(weights), "updates" if params is None else "params")
        if params is not None:
            params = structure.unflatten(_lay(weights, over))
        paths = [keystr(path) for path, _ in leaves_with_path(updates, is_leaf=is_none)]
        # On Auto axes jit does not show the shardings, which kernels must know.
        known = {path: s for path, s in zip(paths, over, strict=True) if s and AxisType.Auto in mesh.axis_types}
        with engines.told(known):
            new, state = take(structure.unflatten(_lay(leaves, over)), state, params, **extra_args)
        return structure.unflatten(_lay(structure.flatten_up_to(new), own)), lay_state(state, weights, structure, over)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return part(inner.update, updates, state, params, extra_args)

    def take(grads: Any, state: Any, params: Any, engine: str, extra_args: Any) -> tuple[optax.Params, optax.OptState]:
        return part(functools.partial(inner.step, engine=engine), grads, state, params, extra_args)

    spreading = Spread(init, update)
    spreading.spread, spreading.take = spread, take
    return spreading


def _on(name: str, mesh: Any, path: str, leaf: Any, given: Any) -> NamedSharding:
    """The parameter's sharding over the mesh."""
    shown: Any = getattr(leaf, "sharding", None)
    if is_traced(leaf):
        shown = jax.typeof(leaf).sharding
        if AxisType.Manual in shown.mesh.axis_types:
            raise ValueError(f"{path} is one device's own, inside of shard_map or pmap: {name} is for jit")
        shown = shown if AxisType.Explicit in shown.mesh.axis_types else None
        if shown is None and given is None:
            return NamedSharding(mesh, PartitionSpec())
    elif isinstance(leaf, jax.Array) and isinstance(mesh, AbstractMesh):
        raise ValueError(
            f"{path} is an array, but the mesh of {name} is abstract, {dict(mesh.shape)}: it is for a plan"
        )
    if given is None:
        own = _on_mesh(name, mesh, path, shown)
        if AxisType.Auto in mesh.axis_types and not own.is_fully_replicated:
            raise ValueError(
                f"{path} is sharded as {own.spec} over Auto axes, which jit does not show: "
                f"{name} needs param_shardings=jax.tree.map(lambda p: p.sharding, params)"
            )
        return NamedSharding(mesh, own.spec)
    told = NamedSharding(mesh, _on_mesh(name, mesh, f"param_shardings for {path}", given).spec)
    if shown is not None:
        own = _on_mesh(name, mesh, path, shown)
        if not NamedSharding(mesh, own.spec).is_equivalent_to(told, len(shape_of(leaf))):
            raise ValueError(f"{path} is sharded as {own.spec}, but param_shardings says {told.spec}")
    return told


def _on_mesh(name: str, mesh: Any, path: str, sharding: Any) -> NamedSharding:
    """The sharding; refused where it is elsewhere."""
    where = f"the mesh {dict(sharding.mesh.shape)}" if isinstance(sharding, NamedSharding) else "no mesh"
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape:
        raise ValueError(
            f"{path} is on {where}, and not on that of {name}, {dict(mesh.shape)}: put it there before init, "
            "as jax.device_put(params, NamedSharding(mesh, PartitionSpec())) does"
        )
    if isinstance(mesh, Mesh) and isinstance(sharding.mesh, Mesh):
        theirs, ours = ([device.id for device in devices.flat] for devices in (sharding.mesh.devices, mesh.devices))
        if theirs != ours:
            raise ValueError(f"{path} is on the devices {theirs}, and the mesh of {name} has {ours}, in this order")
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
