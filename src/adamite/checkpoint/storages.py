"""The tree that is to be read where another storage is meant: as wanted, with the checkpoint's own storages.

What the checkpoint says is not trusted. It is taken over where it can be so; else what is wanted stays, and is refused.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from adamite.checkpoint.leaves import Leaf, dtype_of, retyped
from adamite.checkpoint.manifest import Manifest
from adamite.convert import UNSIGNED, is_rule_state
from adamite.core.placement import fitted
from adamite.core.rule_part import Counted
from adamite.paths import leaves_with_path, map_with_path
from adamite.storage import Quantized


def as_stored(manifest: Manifest, like: Any) -> Any:
    """`like`, its moments kept as the checkpoint has them."""
    nodes = leaves_with_path(like, is_rule_state)
    return jax.tree.structure(like, is_leaf=is_rule_state).unflatten(
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
    last = jax.tree.leaves(own)[-1]
    beside = getattr(last, "sharding", None)
    if isinstance(beside, NamedSharding):
        beside = NamedSharding(beside.mesh, PartitionSpec())
    return Counted(retyped(last, (), jnp.int32, beside), new)


def _moment_stored(manifest: Manifest, path: str, moment: Any) -> Any:
    """A moment of all leaves."""
    values = moment.codes if isinstance(moment, Quantized) else moment

    def tree(field: str) -> Any:
        return map_with_path(
            lambda leaf, x: _as_saved(
                manifest.leaves.get(f"{path}{field}{keystr(leaf)}"), x, scales=field == ".scales"
            ),
            values,
        )

    quantized = manifest.types.get(path) == Quantized.__name__
    return Quantized(tree(".codes"), tree(".scales")) if quantized else tree("")


def _as_saved(saved: Leaf | None, x: Any, *, scales: bool) -> Any:
    """A moment's array as it was saved, if it can be one of that parameter; else as it is, which will be refused."""
    if saved is None or dtype_of(saved.dtype) is None or len(saved.shape) != len(x.shape):
        return x
    if not all(n == m or (scales and n <= m) for n, m in zip(saved.shape, x.shape, strict=True)):
        return x
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and saved.shape != x.shape:
        sharding = fitted(sharding, x.shape, saved.shape)
    return retyped(x, saved.shape, dtype_of(saved.dtype), sharding)
