"""Writing and reading checkpoints with Orbax, which makes them whole or not at all, on any number of processes.

What Orbax does not know stands in the manifest beside its files. On the way back every difference is found before
anything is allocated, and every array's hash before anything is given out.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from adamite import checks
from adamite.checkpoint.differences import compare, names
from adamite.checkpoint.hashing import sha256
from adamite.checkpoint.leaves import array, cast, describe, empty, leaves_of, restored, target
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.settings import settings
from adamite.checks import RefusedError
from adamite.convert import stored_as

ARRAYS, MANIFEST = "arrays", "adamite"
"""The names of Orbax's items."""

Where = str | os.PathLike[str] | ocp.CheckpointManager


class Checkpoint(NamedTuple):
    """What `restore` gives."""

    step: int
    tree: Any
    record: Any


def manager(
    folder: str | os.PathLike[str],
    options: ocp.CheckpointManagerOptions | None = None,
    also: Mapping[str, ocp.CheckpointHandler] | None = None,
) -> ocp.CheckpointManager:
    """Orbax's manager of a folder of checkpoints, for all that `save` and `restore` leave to it.

    Args:
        folder: of this machine, or such as gs://.
        options: how many are kept, which steps are saved, whether writing goes on after `save` returns.
        also: the handlers of other items that `save` is given, by name.
    """
    handlers = {ARRAYS: ocp.StandardCheckpointHandler(), MANIFEST: ocp.JsonCheckpointHandler(), **(also or {})}
    name = checks.path("folder", folder)
    return ocp.CheckpointManager(
        name if "://" in name else os.path.abspath(name), options=options, item_handlers=handlers
    )


def save(
    where: Where,
    step: int,
    tree: Any,
    tx: Any = None,
    *,
    record: Any = None,
    also: Mapping[str, ocp.args.CheckpointArgs] | None = None,
) -> bool:
    """Write a checkpoint. A process that is killed meanwhile leaves those before it as they are.

    Args:
        where: a folder, which is made; all its checkpoints are kept, and this one is complete on return. Or a
            `manager`, whose options say how many are kept and whether writing goes on after the return: the arrays
            have been hashed and copied then, and may be donated.
        step: how many steps were taken, a whole number >= 0, of which there is no checkpoint yet.
        tree: parameters, optimizer state and what else is to go on: arrays of JAX or NumPy, random keys and numbers.
        tx: the optimizer, whose name and arguments are kept to be compared (see `adamite.identity`).
        record: what else is to be known, as JSON has it: dicts with strings for keys, lists, strings, numbers.
        also: other items for Orbax, such as a data loader's, whose handlers the manager was given; it reads them, too.

    Returns:
        Whether it is or will be written: False where the manager leaves this step out.

    Raises:
        TypeError: a leaf of `tree` is something else; `record` is not JSON; `step` is no whole number.
        ValueError: `step` is below 0 or there already.
    """
    step = checks.whole("step", step, lowest=0)
    leaves, record = leaves_of(tree), _json(record)
    described = {path: describe(leaf) for path, leaf in leaves.items()}
    arrays = {path: array(leaf) for path, leaf in leaves.items()}
    with _opened(where) as its:
        if step in its.all_steps():
            raise ValueError(f"step must be new, got {step}, of which there is a checkpoint in {its.directory}")
        if its is where and not its.should_save(step):
            return False
        hashes = sha256(list(arrays.values()), [leaf.grid for leaf in described.values()])
        told = settings(tx) if tx is not None else {}
        manifest = Manifest(step, record, told, types_of(tree), described, dict(zip(leaves, hashes, strict=True)))
        items = {
            ARRAYS: ocp.args.StandardSave({path: x for path, x in arrays.items() if np.size(x)} or NONE),
            MANIFEST: ocp.args.JsonSave(manifest.to_json()),
        }
        return its.save(step, args=ocp.args.Composite(**items, **(also or {})), force=True)


def restore(
    where: Where, like: Any, tx: Any = None, *, step: int | None = None, allow: str | Collection[str] = ()
) -> Checkpoint:
    """Read a checkpoint, if it is whole and is what is expected.

    Args:
        where: a folder, or a `manager`.
        like: a tree as the saved one is to be: structure, shapes, dtypes and shardings are its. Arrays of JAX or NumPy
            and numbers, of which the values do not matter, or `jax.ShapeDtypeStruct`.
        tx: the optimizer that goes on. Its name and arguments must be those of the one that was saved.
        step: which checkpoint; None: the last.
        allow: the names of differences that are meant, as errors tell them. "storage": moments are kept in another way,
            and converted; "dtype": floating arrays are cast; "mesh": arrays are laid on other devices;
            "optimizer.learning_rate", for any argument: it is another.

    Returns:
        ``Checkpoint(step, tree, record)``.

    Raises:
        RefusedError: files are damaged, or something differs: each difference is named with its path and both values.
        FileNotFoundError: there is no such checkpoint.
        TypeError: an argument is the wrong kind of thing, or holds it.
        ValueError: `allow` is unknown.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from adamite import adam
        >>> folder = tempfile.TemporaryDirectory()
        >>> params = {"w": jnp.arange(3.0)}
        >>> tx = adam(1e-3)
        >>> save(folder.name, 7, (params, tx.init(params)), tx)
        True
        >>> restore(folder.name, (params, tx.init(params)), tx).tree[0]
        {'w': Array([0., 1., 2.], dtype=float32)}
        >>> tx = adam(1e-4)
        >>> restore(folder.name, (params, tx.init(params)), tx)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adamite.checks.RefusedError: ... is another's:
          optimizer.learning_rate: saved 0.001, now 0.0001 (allow 'optimizer.learning_rate')
        >>> restore(folder.name, (params, tx.init(params)), tx, allow="optimizer.learning_rate").step
        7
        >>> folder.cleanup()
    """
    allowed = names(allow)
    leaves_of(like, "like")
    with _opened(where, create=False) as its:
        step = _chosen(its, step)
        with _refusing(its, step):
            manifest = _manifest(its, step)
            expected = compare(manifest, like, tx, allowed)
            leaves = leaves_of(expected)
            arrays = _arrays(its, step, {path: target(leaf) for path, leaf in leaves.items()})
            _check_hashes(manifest, arrays)
    tree = jax.tree.structure(expected).unflatten(restored(arrays[path], leaf) for path, leaf in leaves.items())
    if "storage" in allowed:
        tree = stored_as(tree, like)
    if "dtype" in allowed:
        tree = jax.tree.map(cast, tree, like)
    return Checkpoint(step, tree, manifest.record)


def read_manifest(where: Where, *, step: int | None = None) -> Manifest:
    """What a checkpoint says of itself: its record, its optimizer, its arrays' shapes and hashes. No array is read.

    Args:
        where: see `restore`.
        step: see `restore`.

    Raises:
        RefusedError: the manifest is damaged.
        FileNotFoundError: there is no such checkpoint.
    """
    with _opened(where, create=False) as its:
        step = _chosen(its, step)
        with _refusing(its, step):
            return _manifest(its, step)


NONE = {"": np.zeros(1)}
"""In place of no arrays at all, which Orbax refuses."""


@contextlib.contextmanager
def _opened(where: Where, create: bool = True) -> Iterator[ocp.CheckpointManager]:
    if isinstance(where, ocp.CheckpointManager):
        yield where
        return
    if not isinstance(where, (str, os.PathLike)):
        raise TypeError(
            f"where must be a folder or a CheckpointManager, got {where!r:.80} of type {type(where).__name__}"
        )
    if not create and not os.path.isdir(where) and "://" not in os.fspath(where):
        raise FileNotFoundError(f"there is no folder {os.fspath(where)}")
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=create)
    with manager(where, options) as its:
        yield its


def _chosen(its: ocp.CheckpointManager, step: int | None) -> int:
    steps = sorted(its.all_steps())
    if step is not None:
        step = checks.whole("step", step, lowest=0)
    if not steps or (step is not None and step not in steps):
        have = f"those of steps {', '.join(map(str, steps))} are" if steps else "none is"
        raise FileNotFoundError(
            f"there is no checkpoint{'' if step is None else f' of step {step}'} in {its.directory}: {have} there"
        )
    return steps[-1] if step is None else step


@contextlib.contextmanager
def _refusing(its: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Whatever goes wrong while files are read, they are to blame."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"step {step} in {its.directory}: {error}") from None
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise RefusedError(
            f"step {step} in {its.directory} cannot be read: {type(error).__name__}: {error!s:.500}"
        ) from error


def _manifest(its: ocp.CheckpointManager, step: int) -> Manifest:
    content = its.restore(step, args=ocp.args.Composite(**{MANIFEST: ocp.args.JsonRestore()}))[MANIFEST]
    manifest = Manifest.from_json(content)
    if manifest.step != step:
        raise RefusedError(f"the checkpoint must be of step {step}, but says that it is of step {manifest.step}")
    return manifest


def _arrays(its: ocp.CheckpointManager, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays, as Orbax has them."""
    there = {path: x for path, x in wanted.items() if np.prod(x.shape)} or NONE
    found = its.item_metadata(step)[ARRAYS]
    if found is None:
        raise RefusedError("its arrays are not there; or the manager is not one of adamite.checkpoint.manager")
    found = dict(found.tree)
    for path in sorted(found.keys() | there.keys()):
        kept, told = _type(found.get(path)), _type(there.get(path))
        if kept != told:
            raise RefusedError(f"its files hold {kept} for tree{path}, its manifest says {told}")
    arrays = its.restore(step, args=ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore(there)}))[ARRAYS]
    return {path: arrays[path] if path in there else empty(x) for path, x in wanted.items()}


def _check_hashes(manifest: Manifest, arrays: dict[str, Any]) -> None:
    hashes = sha256(list(arrays.values()), [manifest.leaves[path].grid for path in arrays])
    for (path, x), found in zip(arrays.items(), hashes, strict=True):
        if found != manifest.sha256[path]:
            raise RefusedError(
                f"tree{path}, {x.dtype.name}{list(x.shape)}, is damaged: "
                f"its SHA-256 is {found}, saved {manifest.sha256[path]}"
            )


def _json(value: Any, where: str = "record") -> Any:
    """A copy, of what JSON has."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} must have strings for keys, got {key!r:.80} of type {type(key).__name__}")
        return {key: _json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} must be what JSON has, got {value!r:.80} of type {type(value).__name__}")


def _type(x: Any) -> str:
    return "nothing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"
