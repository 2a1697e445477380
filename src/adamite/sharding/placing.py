"""A transformation that knows how its parameters are sharded, where jit does not show it."""

from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import keystr

from adamite.identity import describe
from adamite.paths import leaves_with_path
from adamite.sharding.laying import laid
from adamite.sharding.layout import Spread


def placed(tx: optax.GradientTransformation, params: Any) -> Spread:
    """Tell a transformation how its parameters are sharded, so that each device steps its own part by a kernel.

    On a mesh of Auto axes jit does not show how arrays are sharded. On CPUs XLA's partitioner is asked; on TPUs that is
    not possible, and without `placed` XLA takes the step there. On a mesh of Explicit axes, and inside of shard_map,
    the types show it, and `placed` changes nothing but that it checks.

    Gradients and parameters are laid out as told, and so is the state; with another sharding they are moved there.
    Results are those of `tx`. It is for jit, and the outermost of transformations; `adamite.sharding.zero1` tells the
    shardings, too.

    Args:
        tx: any gradient transformation, of adamite or of optax.
        params: tree of the parameters' structure, of arrays on a mesh, of `jax.ShapeDtypeStruct` with shardings, or of
            `NamedSharding`; or a prefix of one. All are on one mesh.

    Returns:
        The transformation. Its state is that of `tx`, sharded as `state_shardings` says.

    Raises:
        ValueError: a leaf is not on a mesh, or they are on several; there are none; `tx` is such a transformation
            already; at init or update, a parameter is on another mesh.
        TypeError: `tx` is no gradient transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from adamite import adamw
        >>> from jax.sharding import PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> params = jax.device_put(jnp.ones((8, 512)), NamedSharding(mesh, PartitionSpec("data")))
        >>> tx = placed(adamw(1e-3, moments="int8"), params)
        >>> state = jax.jit(tx.init)(params)
        >>> params, state = jax.jit(tx.step)(jnp.ones_like(params), state, params)
        >>> state[0].mu.codes.sharding.spec
        P('data', None)
    """
    own = {keystr(path): _on_a_mesh(keystr(path), leaf) for path, leaf in leaves_with_path(params)}
    if not own:
        raise ValueError("params must hold an array or a sharding at least")
    mesh = next(iter(own.values())).mesh
    for path, sharding in own.items():
        if sharding.mesh != mesh:
            raise ValueError(f"params{path} is on the mesh {sharding.mesh}, and others are on {mesh}")
    told = laid("placed", tx, mesh, (), jax.tree.structure(params).unflatten(own.values()))
    return describe(told, "placed", {"tx": tx, "param_shardings": own})  # which keeps no array alive


def _on_a_mesh(path: str, leaf: Any) -> NamedSharding:
    sharding = leaf if isinstance(leaf, jax.sharding.Sharding) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"params{path} is not sharded over a mesh, got {sharding!r:.80}: put it there before, "
            "as jax.device_put(params, NamedSharding(mesh, PartitionSpec())) does"
        )
    if len(set(sharding.mesh.axis_types)) > 1 or AxisType.Manual in sharding.mesh.axis_types:
        raise ValueError(f"params{path} must be on a mesh whose axes are all Auto or all Explicit, got {sharding.mesh}")
    return sharding
