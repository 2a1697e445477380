"""Where an optimizer's state lives on a mesh: beside the parameters, or spread over one more axis of it (ZeRO-1).

Devices that train one set of parameters on different data all keep the same state. ZeRO-1 leaves each of them a part:

    g         <-  the sum of all devices' gradients, each keeping its part      reduce-scatter
    u, state  <-  update(g, state, p)                                           each its part
    u         <-  the parts put together                                        all-gather

These two move the bytes of the all-reduce that they replace. Nothing is computed here: arrays are told where to live,
and XLA puts in the rest.

Rajbhandari, Rasley, Ruwase & He 2020, arXiv:1910.02054, section 5.1 (P_os).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import keystr, tree_leaves_with_path

from adamite import checks
from adamite.engine.matching import counterparts, same_rank, shape_of
from adamite.engine.ownership import Owned, owned
from adamite.engine.placement import fitted
from adamite.numerics import is_none


class Spread(optax.GradientTransformationExtraArgs):
    """A gradient transformation whose state is sharded otherwise than the parameters."""

    spread: Callable[[Sequence[Any], Sequence[Any]], list[Any]] | None = None
    """``spread(leaves, shardings)``: with parameters sharded so, the state is as if they were sharded so."""


def state_shardings(tx: optax.GradientTransformation, params: Any, param_shardings: Any = None) -> Any:
    """How the state of a gradient transformation is sharded, where parameters are sharded so. Nothing is allocated.

    It serves as ``out_shardings`` of a jitted ``tx.init``, as target of a checkpoint, and to look at.

    Args:
        tx: any gradient transformation, of adamite or of optax. If it is that of `zero1`, that counts; a `zero1` inside
            of another transformation is not seen.
        params: tree of arrays, or of anything with a ``shape`` and a ``dtype`` (`jax.eval_shape` gives such a tree).
        param_shardings: tree of `jax.sharding.Sharding`, or a prefix of one. None: those of `params`.

    Returns:
        Tree of the structure of ``tx.init(params)``. Arrays that belong to a parameter and have its shape are sharded
        as it is, others of its rank (scales of blocks, averages over axes) where that divides them; the rest, step
        counts and the like, is on every device.

    Raises:
        TypeError: `tx` is no gradient transformation; a leaf of `params` has no shape and dtype, or no sharding;
            `param_shardings` holds something else.
        ValueError: `param_shardings` has another structure than `params`, or does not divide a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> params = jax.eval_shape(lambda: {"w": jnp.zeros((512, 256))})
        >>> columns = NamedSharding(mesh, PartitionSpec(None, "model"))
        >>> adam_state, _ = state_shardings(zero1(adam(1e-3, moments="int8"), mesh), params, columns)
        >>> adam_state.mu.codes["w"].spec, adam_state.mu.scales["w"].spec, adam_state.count.spec
        (P('data', 'model'), P('data', 'model'), P())
    """
    leaves, structure = jax.tree.flatten(checks.abstract(params, "params"))
    shardings = of_params(params, param_shardings, "param_shardings")
    for (path, _), sharding in zip(tree_leaves_with_path(params), shardings, strict=True):
        if sharding is None:
            raise TypeError(f"params{keystr(path)} is not sharded over a mesh: state_shardings needs param_shardings")
    state = jax.eval_shape(checks.transformation("tx", tx).init, structure.unflatten(leaves))
    everywhere = _everywhere(shardings)
    found = of_state(tx, state, leaves, structure, shardings)
    return jax.tree.structure(state).unflatten(everywhere if s is None else s for _, s in found)


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
    where arrays are each device's own.

    Args:
        tx: any gradient transformation whose state belongs to parameters, of adamite or of optax.
        mesh: the mesh on which the parameters are, its axes all Auto or all Explicit; abstract for a plan.
        axis: the name of the axis over which the batch is sharded, or several.
        param_shardings: tree of `NamedSharding`, or a prefix of one. None: on a mesh of Explicit axes those of the
            parameters; on one of Auto axes parameters are on every device, as jit does not show how they are sharded.

    Returns:
        The transformation. Its state is that of `tx`.

    Raises:
        ValueError: the mesh has no such axis, or axes of both types; at init or update, a parameter is not on this
            mesh, or is sharded and nothing says so to jit; there is no dimension of that number.
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
    inner = optax.with_extra_args_support(checks.transformation("tx", tx))
    names = _axes(mesh, axis)

    def spread(leaves: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        return [with_axes(s, shape_of(leaf), names) if s else None for leaf, s in zip(leaves, shardings, strict=True)]

    def layout(params: Any) -> tuple[list[Any], list[Any]]:
        """The sharding of each parameter, None being one, and that by which its state is sharded."""
        leaves = tree_leaves_with_path(params, is_leaf=is_none)
        told = None if param_shardings is None else iter(of_params(params, param_shardings, "param_shardings"))
        own = []
        for path, leaf in leaves:
            its = None if leaf is None or told is None else next(told)
            own.append(None if leaf is None else _on(mesh, f"params{keystr(path)}", leaf, its))
        return own, spread([leaf for _, leaf in leaves], own)

    def init(params: optax.Params) -> optax.OptState:
        leaves, structure = jax.tree.flatten(params)
        _, over = layout(params)
        state = inner.init(structure.unflatten(_lay(leaves, over)))
        found = of_state(inner, state, leaves, structure, over)
        arrays, form = jax.tree.flatten(state)
        home = NamedSharding(mesh, PartitionSpec())
        return form.unflatten(_lay(arrays, [home if s is None else s for _, s in found]))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        weights = leaves if params is None else counterparts(updates, params, "params")
        own, over = layout(structure.unflatten(weights))
        if params is not None:
            params = structure.unflatten(_lay(weights, over))
        new, state = inner.update(structure.unflatten(_lay(leaves, over)), state, params, **extra_args)
        arrays, form = jax.tree.flatten(state)
        kept = _lay(arrays, [s for _, s in of_state(inner, state, weights, structure, over)])
        return structure.unflatten(_lay(structure.flatten_up_to(new), own)), form.unflatten(kept)

    spreading = Spread(init, update)
    spreading.spread = spread
    return spreading


def of_params(params: Any, shardings: Any, name: str) -> list[Sharding | None]:
    """The sharding of each parameter; None for one that is not on a mesh.

    Args:
        params: tree of arrays, abstract or not.
        shardings: tree of `jax.sharding.Sharding`, or a prefix of one. None: those of `params` that are of a mesh.
        name: what `shardings` is called in an error.
    """
    leaves = tree_leaves_with_path(params)
    if shardings is None:
        own = [getattr(leaf, "sharding", None) for _, leaf in leaves]
        return [s if isinstance(s, NamedSharding) else None for s in own]
    try:
        found = jax.tree.leaves(jax.tree.broadcast(shardings, params))
    except ValueError as error:
        raise ValueError(f"{name} must have the structure of params or a prefix of it: {error}") from None
    for (path, leaf), sharding in zip(leaves, found, strict=True):
        if not isinstance(sharding, Sharding):
            raise TypeError(f"{name} must hold jax.sharding.Sharding, got {sharding!r:.80} for params{keystr(path)}")
        try:
            sharding.shard_shape(shape_of(leaf))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{name} must divide params{keystr(path)} of shape {shape_of(leaf)}: {error}") from None
    return found


def of_state(
    tx: Any, state: Any, leaves: Sequence[Any], structure: Any, shardings: Sequence[Any]
) -> list[tuple[Owned, Any]]:
    """The arrays of the state of `tx`, in the order of `jax.tree.leaves`, each with its sharding; None for no leaf's.

    Args:
        tx: the transformation; if it is a `Spread`, its state is sharded as it says.
        state: its state, abstract or not.
        leaves: the parameters, each with a shape.
        structure: of the tree that they are the leaves of.
        shardings: that of each of them, or None.
    """
    if isinstance(tx, Spread) and tx.spread:
        shardings = tx.spread(leaves, shardings)

    def sharding_of(array: Owned) -> Sharding | None:
        sharding = None if array.owner is None else shardings[array.owner]
        if array.owner is None or sharding is None:
            return None
        here, shape = array.array.shape, shape_of(leaves[array.owner])
        if here == shape:
            return sharding
        return fitted(sharding, shape, here) if isinstance(sharding, NamedSharding) and same_rank(here, shape) else None

    return [(array, sharding_of(array)) for array in owned(state, structure)]


def with_axes(sharding: NamedSharding, shape: tuple[int, ...], names: tuple[str, ...]) -> NamedSharding:
    """The sharding with more axes on one dimension, where it can be."""
    spec = [_names(entry) for entry in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))]
    if names_of(sharding) & {*names}:
        return sharding
    for i in sorted(range(len(shape)), key=lambda i: len(spec[i]) > 0):
        if shape[i] % math.prod(sharding.mesh.shape[name] for name in (*spec[i], *names)) == 0:
            spec[i] = (*spec[i], *names)
            return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in spec)))
    return sharding


def names_of(sharding: NamedSharding) -> set[str]:
    """The axes that shard anything."""
    return {name for entry in sharding.spec for name in _names(entry)}


def _names(entry: Any) -> tuple[str, ...]:
    """The axes that shard a dimension."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


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
    kinds = jax.typeof(leaf).sharding.mesh.axis_types if isinstance(leaf, Tracer) else ()
    if AxisType.Manual in kinds:
        raise ValueError(f"{path} is one device's own, inside of shard_map or pmap: zero1 is for jit")
    if given is None and isinstance(leaf, Tracer) and AxisType.Explicit not in kinds:
        return NamedSharding(mesh, PartitionSpec())
    sharding = given if given is not None else jax.typeof(leaf).sharding if kinds else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape:
        where = f"the mesh {dict(sharding.mesh.shape)}" if isinstance(sharding, NamedSharding) else "no mesh"
        raise ValueError(
            f"{path} is on {where}, and not on that of zero1, {dict(mesh.shape)}: put it there before init, "
            "as jax.device_put(params, NamedSharding(mesh, PartitionSpec())) does"
        )
    if given is None and AxisType.Auto in mesh.axis_types and not sharding.is_fully_replicated:
        raise ValueError(
            f"{path} is sharded as {sharding.spec} over Auto axes, which jit does not show: "
            "zero1 needs param_shardings=jax.tree.map(lambda p: p.sharding, params)"
        )
    return NamedSharding(mesh, sharding.spec)


def _lay(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Each array where its sharding says, eagerly and under jit; those without one as they are."""

    def lay(x: Any, sharding: Any) -> Any:
        if x is None or sharding is None:
            return x
        if not isinstance(x, Tracer):
            return jax.device_put(x, sharding)
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(x, sharding)

    return [lay(x, sharding) for x, sharding in zip(arrays, shardings, strict=True)]


def _everywhere(shardings: Sequence[Any]) -> Any:
    """The sharding of what every device has, where such parameters are."""
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else next(iter(shardings), None)
