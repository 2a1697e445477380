"""How each array of a state is sharded, where the parameters are sharded so."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.tree_util import KeyPath, keystr

from adamite import checks
from adamite.core.matching import same_rank, shape_of
from adamite.core.optimizer import Optimizer
from adamite.core.ownership import Owned, owned
from adamite.core.placement import fitted
from adamite.paths import leaves_with_path


class Spread(Optimizer):
    """A gradient transformation whose state lives otherwise than the parameters."""

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
        ValueError: `param_shardings` has another structure than `params`, or does not divide a leaf; `params` is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> from adamite.sharding import zero1
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> params = jax.eval_shape(lambda: {"w": jnp.zeros((512, 256))})
        >>> columns = NamedSharding(mesh, PartitionSpec(None, "model"))
        >>> adam_state, _ = state_shardings(zero1(adam(1e-3, moments="int8"), mesh), params, columns)
        >>> adam_state.mu.codes["w"].spec, adam_state.mu.scales["w"].spec, adam_state.count.spec
        (P('data', 'model'), P('data', 'model'), P())
    """
    leaves, structure = jax.tree.flatten(checks.abstract(params, "params"))
    shardings = of_params(params, param_shardings, "param_shardings")
    for (path, _), sharding in zip(leaves_with_path(params), shardings, strict=True):
        if sharding is None:
            raise TypeError(f"params{keystr(path)} is not sharded over a mesh: state_shardings needs param_shardings")
    if not leaves:
        raise ValueError("params must hold an array at least: without any there is no mesh for the state")
    state = jax.eval_shape(checks.transformation("tx", tx).init, structure.unflatten(leaves))
    everywhere = _everywhere(shardings)
    found = of_state(tx, state, leaves, structure, shardings)
    return jax.tree.structure(state).unflatten(everywhere if s is None else s for _, s in found)


def of_params(params: Any, shardings: Any, name: str) -> list[Sharding | None]:
    """The sharding of each parameter; None for one that is not on a mesh.

    Args:
        params: tree of arrays, abstract or not.
        shardings: tree of `jax.sharding.Sharding`, or a prefix of one. None: those of `params` that are of a mesh.
        name: what `shardings` is called in an error.
    """
    leaves = leaves_with_path(params)
    if shardings is None:
        own = [getattr(leaf, "sharding", None) for _, leaf in leaves]
        return [s if isinstance(s, NamedSharding) else None for s in own]
    try:
        found = jax.tree.leaves(jax.tree.broadcast(shardings, params))
    except ValueError as error:
        found = _by_path(leaves, shardings)
        if found is None:
            raise ValueError(f"{name} must have the structure of params or a prefix of it: {error}") from None
    for (path, leaf), sharding in zip(leaves, found, strict=True):
        if not isinstance(sharding, Sharding):
            raise TypeError(f"{name} must hold jax.sharding.Sharding, got {sharding!r:.80} for params{keystr(path)}")
        try:
            sharding.shard_shape(shape_of(leaf))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{name} must divide params{keystr(path)} of shape {shape_of(leaf)}: {error}") from None
    return found


def _by_path(leaves: Sequence[tuple[KeyPath, Any]], shardings: Any) -> list[Any] | None:
    """The shardings of leaves at the same paths: those of Flax NNX's variables belong to the arrays in them."""
    theirs = leaves_with_path(shardings)
    same = [path for path, _ in theirs] == [path for path, _ in leaves]
    return [sharding for _, sharding in theirs] if same else None


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
    shardings = spread_by(tx, leaves, shardings)

    def sharding_of(array: Owned) -> Sharding | None:
        sharding = None if array.owner is None else shardings[array.owner]
        if array.owner is None or sharding is None:
            return None
        here, shape = array.array.shape, shape_of(leaves[array.owner])
        if here == shape:
            return sharding
        return fitted(sharding, shape, here) if isinstance(sharding, NamedSharding) and same_rank(here, shape) else None

    return [(array, sharding_of(array)) for array in owned(state, structure)]


def spread_by(tx: Any, leaves: Sequence[Any], shardings: Sequence[Any]) -> Sequence[Any]:
    """As if the parameters were sharded how: so `tx` shards its state."""
    return tx.spread(leaves, shardings) if isinstance(tx, Spread) and tx.spread else shardings


def with_axes(sharding: NamedSharding, shape: tuple[int, ...], names: tuple[str, ...]) -> NamedSharding:
    """The sharding with those of the axes that it has not yet on one dimension more, where they divide one."""
    used = names_of(sharding)
    names = tuple(name for name in names if name not in used)
    spec = [_names(entry) for entry in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))]
    for i in sorted(range(len(shape)), key=lambda i: len(spec[i]) > 0):
        if shape[i] % math.prod(sharding.mesh.shape[name] for name in (*spec[i], *names)) == 0:
            spec[i] = (*spec[i], *names)
            whole = PartitionSpec(*(entry or None for entry in spec))
            return NamedSharding(sharding.mesh, whole, memory_kind=sharding.memory_kind)
    return sharding


def names_of(sharding: NamedSharding) -> set[str]:
    """The axes that shard anything."""
    return {name for entry in sharding.spec for name in _names(entry)}


def _names(entry: Any) -> tuple[str, ...]:
    """The axes that shard a dimension."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _everywhere(shardings: Sequence[Any]) -> Any:
    """The sharding of what every device has, where such parameters are."""
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else next(iter(shardings), None)
