"""The tree that is to be read where a difference is meant: as wanted, with the checkpoint's own storages or dtypes.

What the checkpoint says is not trusted. It is taken over where it can be so; else what is wanted stays, and is refused.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

from adamite.checkpoint.leaves import Leaf
from adamite.checkpoint.manifest import Manifest
from adamite.convert import UNSIGNED, is_rule_state
from adamite.engine.per_leaf import Counted
from adamite.engine.placement import fitted
from adamite.storage import Quantized


def as_stored(manifest: Manifest, like: Any) -> Any:
    """`like`, its moments kept as the checkpoint has them."""
    nodes, structure = tree_flatten_with_path(like, is_leaf=is_rule_state)
    return structure.unflatten(
        _node_stored(manifest, keystr(path), node) if is_rule_state(node) else node for path, node in nodes
    )


def _node_stored(manifest: Manifest, path: str, node: Any) -> Any:
    """A rule's state."""
    counted = manifest.types.get(path) == Counted.__name__
    own = node.inner if isinstance(node, Counted) else node
    home = f"{path}.inner" if counted else path
    names = [name for name in own._fields if name in UNSIGNED]
    new = own._replace(**{name: _moment_stored(manifest, f"{home}.{name}", getattr(own, name)) for name in names})
    if not counted:
        return new
    beside = getattr(jax.tree.leaves(own)[-1], "sharding", None)
    if isinstance(beside, NamedSharding):
        beside = NamedSharding(beside.mesh, PartitionSpec())
    return Counted(jax.ShapeDtypeStruct((), jnp.int32, sharding=beside), new)


def _moment_stored(manifest: Manifest, path: str, moment: Any) -> Any:
    """A moment of all leaves."""
    values, structure = tree_flatten_with_path(moment.codes if isinstance(moment, Quantized) else moment)

    def tree(field: str) -> Any:
        return structure.unflatten(
            _as_saved(manifest.leaves.get(f"{path}{field}{keystr(leaf)}"), x, scales=field == ".scales")
            for leaf, x in values
        )

    quantized = manifest.types.get(path) == Quantized.__name__
    return Quantized(tree(".codes"), tree(".scales")) if quantized else tree("")


def _as_saved(saved: Leaf | None, x: Any, *, scales: bool) -> Any:
    """A moment's array as it was saved, if it can be one of that parameter; else as it is, which will be refused."""
    if saved is None or _dtype(saved.dtype) is None or len(saved.shape) != len(x.shape):
        return x
    if not all(n == m or (scales and n <= m) for n, m in zip(saved.shape, x.shape, strict=True)):
        return x
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and saved.shape != x.shape:
        sharding = fitted(sharding, x.shape, saved.shape)
    return jax.ShapeDtypeStruct(saved.shape, _dtype(saved.dtype), sharding=sharding)


def as_typed(manifest: Manifest, like: Any) -> Any:
    """`like`, floating arrays in the dtypes of the checkpoint."""
    leaves, structure = tree_flatten_with_path(like)

    def one(path: str, x: Any) -> Any:
        saved = manifest.leaves.get(path)
        if saved is None or saved.shape != getattr(x, "shape", None):
            return x
        if not (is_floating(saved.dtype) and is_floating(x.dtype.name)):
            return x
        return jax.ShapeDtypeStruct(x.shape, _dtype(saved.dtype), sharding=getattr(x, "sharding", None))

    return structure.unflatten(one(keystr(path), x) for path, x in leaves)


def is_floating(dtype: str) -> bool:
    """Whether a dtype of that name holds real numbers."""
    found = _dtype(dtype)
    return found is not None and jnp.issubdtype(found, jnp.floating)


def _dtype(name: str) -> Any:
    """The dtype of a name that was read; None if there is none, or its elements are not of a fixed size."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return None
    return dtype if jnp.issubdtype(dtype, jnp.number) else None
