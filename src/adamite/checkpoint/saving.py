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
from adamite.checkpoint import reading
from adamite.checkpoint.differences import names
from adamite.checkpoint.hashing import sha256
from adamite.checkpoint.leaves import array, describe, leaves_of, restored
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.plan import planned
from adamite.checkpoint.reading import ARRAYS, MANIFEST, NONE
from adamite.checkpoint.record import plain
from adamite.checkpoint.settings import settings
from adamite.checks import RefusedError

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
    handlers = {ARRAYS: ocp.PyTreeCheckpointHandler(), MANIFEST: ocp.JsonCheckpointHandler(), **(also or {})}
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
        step: how many steps were taken, a whole number >= 0 or an array of one, of which there is no checkpoint yet.
        tree: parameters, optimizer state and what else is to go on: arrays of JAX or NumPy, random keys and numbers.
        tx: the optimizer, whose name and arguments are kept to be compared (see `adamite.identity`).
        record: what else is to be known, as JSON has it: dicts with strings for keys, lists, strings, numbers. Numbers
            may be of NumPy or JAX, and come back as Python's. NaN and infinities come back, too.
        also: other items for Orbax, such as a data loader's, whose handlers the manager was given; it reads them, too.

    Returns:
        Whether it is or will be written: False where the manager leaves this step out.

    Raises:
        TypeError: a leaf of `tree` is something else; `record` is not JSON; `step` is no whole number.
        ValueError: `step` is below 0 or there already.
    """
    step = checks.whole("step", step, lowest=0)
    leaves, record = leaves_of(tree), plain(record)
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
            ARRAYS: ocp.args.PyTreeSave({path: x for path, x in arrays.items() if np.size(x)} or NONE),
            MANIFEST: ocp.args.JsonSave(manifest.to_json()),
        }
        return its.save(step, args=ocp.args.Composite(**items, **(also or {})), force=True)


def restore(
    where: Where,
    like: Any,
    tx: Any = None,
    *,
    step: int | None = None,
    allow: str | Collection[str] = (),
    only: str | None = None,
) -> Checkpoint:
    """Read a checkpoint, if it is whole and is what is expected.

    Args:
        where: a folder, or a `manager`.
        like: a tree as the result is to be: its structure, types, shapes, dtypes and shardings are those of the result.
            Arrays of JAX or NumPy, random keys and numbers, of which the values do not matter, or
            `jax.ShapeDtypeStruct`. Where it has a number of Python, a saved array of shape () of the same kind (whole,
            floating, True or False) comes back as such a number; where it has such an array, a saved number of Python
            comes back as an array. So the first step after `restore` compiles to the program of a new run's first.
        tx: the optimizer that goes on. Its name and arguments must be those of the one that was saved.
        step: which checkpoint; None: the last.
        allow: the names of differences that are meant, as errors tell them:

            - "storage": moments are stored in another way (``moments=``), and converted to that of `like`;
            - "weights": weights are stored in another way (their dtype, and residuals of ``rounding=``), and converted
              as `adamite.convert_weights` does;
            - "dtype": floating arrays have another dtype, and are cast;
            - "mesh": arrays are on other devices, with `adamite.sharding.zero1` or `placed`, or without;
            - "optimizer.learning_rate", for any argument: it has another value; "optimizer": all of them;
            - "tree[0]['head']", for any place of the tree: what is new there, or has another shape, keeps the value
              that it has in `like`; what is saved and is not in `like` is not read;
            - "['head']": the same, wherever paths have these keys one after another: a parameter, and what an
              optimizer's state holds of it.

        only: the part of the saved tree that is read, such as "tree[0]", and that `like` is; None: all. No other array
            is read. The optimizer is compared only if there is a `tx`.

    Returns:
        ``Checkpoint(step, tree, record)``.

    Raises:
        RefusedError: files are damaged, or something differs: each difference is named with its path and both values;
            or a saved number is too large for its dtype in `like`.
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

        The weights alone:

        >>> restore(folder.name, params, only="tree[0]").tree
        {'w': Array([0., 1., 2.], dtype=float32)}
        >>> folder.cleanup()
    """
    allowed = names(allow)
    leaves_of(like, "like")
    if not (only is None or isinstance(only, str)):
        raise TypeError(
            f"only must be None or a string such as 'tree[0]', got {only!r:.80} of type {type(only).__name__}"
        )
    told = None if tx is None else settings(tx)
    with _opened(where, create=False) as its:
        step = _chosen(its, step)
        with _refusing(its, step):
            manifest = reading.read_manifest(its, step)
            root = manifest.root_of(only)
            read, finish = planned(manifest.below(root), like, told, allowed, f"tree{root}")
            arrays = reading.read_arrays(its, step, manifest, {root + path: leaf for path, leaf in read.items()})
    tree = finish({path: restored(arrays[root + path], leaf) for path, leaf in read.items()})
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
            return reading.read_manifest(its, step)


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
