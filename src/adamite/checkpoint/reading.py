"""Reading a checkpoint's files: its manifest, and the arrays that are asked for, each with the hash that it had."""

from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from adamite.checkpoint.hashing import sha256
from adamite.checkpoint.leaves import empty, target
from adamite.checkpoint.manifest import Manifest
from adamite.checks import RefusedError

ARRAYS, MANIFEST = "arrays", "adamite"
"""The names of Orbax's items."""

NONE = {"": np.zeros(1)}
"""In place of no arrays at all, which Orbax refuses."""


def read_manifest(its: ocp.CheckpointManager, step: int) -> Manifest:
    """What the checkpoint says of itself.

    Raises:
        RefusedError: it is damaged, or of another step.
    """
    content = its.restore(step, args=ocp.args.Composite(**{MANIFEST: ocp.args.JsonRestore()}))[MANIFEST]
    manifest = Manifest.from_json(content)
    if manifest.step != step:
        raise RefusedError(f"the checkpoint must be of step {step}, but says that it is of step {manifest.step}")
    return manifest


def read_arrays(its: ocp.CheckpointManager, step: int, manifest: Manifest, leaves: dict[str, Any]) -> dict[str, Any]:
    """The arrays that stand for leaves, by path; no others are read.

    Arrays on the host come from Orbax as views of memory of its reader. So they are copied, and the copy is hashed.

    Raises:
        RefusedError: an array is damaged, or is not what the manifest says.
    """
    wanted = {path: target(leaf) for path, leaf in leaves.items()}
    there = {path: x for path, x in wanted.items() if np.prod(x.shape)}
    _check_types(its, step, manifest, there)
    arrays = {}
    if there:
        how = ocp.checkpoint_utils.construct_restore_args(there)
        args = ocp.args.PyTreeRestore(there, restore_args=how, partial_restore=True)
        arrays = its.restore(step, args=ocp.args.Composite(**{ARRAYS: args}))[ARRAYS]
    arrays = {path: arrays[path] if path in there else empty(x) for path, x in wanted.items()}
    arrays = {path: np.array(x) if isinstance(x, np.ndarray) else x for path, x in arrays.items()}
    _check_hashes(manifest, arrays)
    return arrays


def _check_types(its: ocp.CheckpointManager, step: int, manifest: Manifest, there: dict[str, Any]) -> None:
    """Whether Orbax's files hold what is wanted, and nothing that the manifest does not know."""
    found = its.item_metadata(step)[ARRAYS]
    if found is None:
        raise RefusedError("its arrays are not there; or the manager is not one of adamite.checkpoint.manager")
    found = {path: x for path, x in dict(found.tree).items() if path in there or path not in manifest.leaves}
    if not any(np.prod(leaf.shape) for leaf in manifest.leaves.values()):
        found = {path: x for path, x in found.items() if path not in NONE}
    for path in sorted(found.keys() | there.keys()):
        kept, told = _type(found.get(path)), _type(there.get(path))
        if kept != told:
            raise RefusedError(f"its files hold {kept} for tree{path}, its manifest says {told}")


def _check_hashes(manifest: Manifest, arrays: dict[str, Any]) -> None:
    hashes = sha256(list(arrays.values()), [manifest.leaves[path].grid for path in arrays])
    for (path, x), found in zip(arrays.items(), hashes, strict=True):
        if found != manifest.sha256[path]:
            raise RefusedError(
                f"tree{path}, {x.dtype.name}{list(x.shape)}, is damaged: "
                f"its SHA-256 is {found}, saved {manifest.sha256[path]}"
            )


def _type(x: Any) -> str:
    return "nothing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"
