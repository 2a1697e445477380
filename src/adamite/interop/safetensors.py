"""Weights as a safetensors file, in the names and the layout of the program that reads it."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamite import checks
from adamite.checks import RefusedError
from adamite.core import full_weights
from adamite.interop.files import DTYPES, opened, replace
from adamite.interop.names import Names, Place, path_name, places
from adamite.paths import leaves_with_path, map_with_path

RECIPE = """\
    weights = torch.load(path, weights_only=True)
    safetensors.torch.save_file({name: x.contiguous() for name, x in weights.items()}, "model.safetensors")"""
"""How weights get out of a pickle, in torch."""


def save_weights(
    path: str | os.PathLike[str],
    params: optax.Params,
    state: optax.OptState | None = None,
    mapping: Names | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights as one safetensors file, as Hugging Face's libraries and torch read them.

    An old file is replaced in one piece: whatever happens, there is the old one or the new one, whole.

    Args:
        path: of the file.
        params: the model's weights, all of them on this host.
        state: the optimizer's; if given, the weights are those that it steps, `adamite.full_weights`: residuals folded
            in, at least float32.
        mapping: from our paths to names there, and axes, see `from_torch`; `flax_names` makes one. None: the same.
        dtype: floating dtype to which floating weights are rounded. None: the one that they have.
        metadata: strings by name, for the file's header; ``format`` is "pt" unless given.

    Raises:
        ValueError: `mapping` or `state` does not fit `params`; weights are of a dtype that such files have not.
        TypeError: an argument is the wrong kind of thing.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> params = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(f"{folder}/model.safetensors", params, mapping={"dense.kernel": ("dense.weight", (1, 0))})
        ...     load_weights(f"{folder}/model.safetensors", {"dense.weight": jnp.zeros((3, 2), jnp.bfloat16)})
        {'dense.weight': Array([[1, 1],
               [1, 1],
               [1, 1]], dtype=bfloat16)}
    """
    dtype, texts = checks.floating_dtype("dtype", dtype), _texts(metadata)
    weights = params if state is None else full_weights(params, state)
    leaves = {path_name(where): leaf for where, leaf in leaves_with_path(weights)}
    arrays = {}
    for place in _named(weights, mapping, "params"):
        array = np.asarray(leaves[place.path])
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        if array.dtype.name not in DTYPES.values():
            raise ValueError(f"{place.path} must be of one of {', '.join(DTYPES.values())}, got {array.dtype.name}")
        arrays[place.name] = place.theirs(array)
    replace(path, arrays, {"format": "pt", **texts})


def load_weights(
    path: str | os.PathLike[str], like: Any, mapping: Names | None = None, *, allow_nonfinite: bool = False
) -> Any:
    """Read weights from a safetensors file of any program's, into a tree that is like another.

    Names, shapes and dtypes are compared before anything is read.

    Args:
        path: of the file.
        like: tree of arrays, or of `jax.ShapeDtypeStruct`: whose structure, shapes, dtypes and shardings are wanted.
        mapping: see `save_weights`.
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        Tree like `like`, the same bits as in the file.

    Raises:
        RefusedError: the file is damaged, or one of ``torch.save``; it has a weight too many or too few, or one of
            another shape or dtype; a weight is not finite.
        ValueError: `mapping` does not fit `like`.
        TypeError: an argument is the wrong kind of thing.
        OSError: the file cannot be opened.
    """
    allow_nonfinite = checks.flag("allow_nonfinite", allow_nonfinite)
    spots = {place.path: place for place in _named(like, mapping, "like")}
    with opened(path, RECIPE) as file:
        for place in spots.values():
            header, wanted = file.headers.get(str(place.name)), (place.shape, place.leaf.dtype.name)
            if header is None:
                raise RefusedError(f"{file.path} must have {place.name!r}, for {place.path}")
            if header != wanted:
                raise RefusedError(
                    f"{file.path}: {place.name!r} must be {wanted}, for {place.path}, got {tuple(header)}"
                )
        for name in file.headers.keys() - {place.name for place in spots.values()}:
            raise RefusedError(f"{file.path} has {name!r:.80}, like has no place for it")

        def one(where: jax.tree_util.KeyPath, leaf: Any) -> jax.Array:
            place = spots[path_name(where)]
            array = file.read(str(place.name))
            if not allow_nonfinite and jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
                raise RefusedError(
                    f"{file.path}: {place.name!r} must be finite; allow_nonfinite=True takes it as it is"
                )
            sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
            return jax.device_put(np.array(place.ours(array), order="C"), sharding)

        return map_with_path(one, like)


def _named(tree: Any, mapping: Names | None, name: str) -> list[Place]:
    """The arrays' places, all of which have names."""
    found = places(tree, mapping, name)
    for place in found:
        if not isinstance(place.name, str):
            raise TypeError(f"mapping must give {place.path!r} a name, got the number {place.name}")
    return found


def _texts(metadata: Mapping[Any, Any] | None) -> Mapping[str, str]:
    texts = {} if metadata is None else metadata
    if not isinstance(texts, Mapping) or not all(isinstance(x, str) for pair in texts.items() for x in pair):
        raise TypeError(f"metadata must be None or a dict of strings, got {texts!r:.80}")
    return texts
