"""What a checkpoint says of itself: whose it is, and of each array its shape, dtype, how it was laid and its hash.

It is JSON, which holds its own SHA-256, too:

    {"schema": 1, "step": 1000, "record": ..., "optimizer": {"name": "adamw", "learning_rate": 0.001, ...},
     "types": {"[1][0]": "ScaleByAdamState", ...},
     "leaves": {"[1][0].mu['w']":
                {"shape": [64, 256], "dtype": "float32", "grid": [8, 1], "devices": 8, "sha256": ...}, ...},
     "sha256": ...}

`types` are the classes of all inner nodes of the saved tree: the states of Adam and of AdaBelief have the same fields.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from jax.tree_util import keystr, tree_flatten_with_path

from adamite.checkpoint.leaves import Leaf
from adamite.checks import RefusedError
from adamite.convert_weights import keys
from adamite.paths import unwrapped

SCHEMA = 1

Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """See above. Paths are those of `jax.tree_util.keystr`, without what Flax wraps arrays in (see `paths`)."""

    step: int
    record: Any
    optimizer: dict[str, Any]
    types: dict[str, str]
    leaves: dict[str, Leaf]
    sha256: dict[str, str]
    """Of each leaf."""

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "step": self.step,
            "record": self.record,
            "optimizer": self.optimizer,
            "types": self.types,
            "leaves": {path: leaf._asdict() | {"sha256": self.sha256[path]} for path, leaf in self.leaves.items()},
        }
        return content | {"sha256": _hash(content)}

    def root_of(self, part: str | None) -> str:
        """The path of a part of the tree, "" of the whole.

        Raises:
            RefusedError: no such part was saved.
        """
        root = "" if part is None else part.removeprefix("tree")
        if part is not None and (not part.startswith("tree") or not self.below(root).leaves):
            known = {f"tree{keys(path)[0]}": None for path in self.leaves if path}
            raise RefusedError(f"only must name a part that was saved, such as {', '.join(known)}, got {part!r:.80}")
        return root

    def below(self, path: str) -> "Manifest":
        """Of the part of the tree that is at `path`: paths begin there."""

        def part(found: dict[str, Any]) -> dict[str, Any]:
            rest = {at.removeprefix(path): value for at, value in found.items() if at.startswith(path)}
            return {at: value for at, value in rest.items() if at[:1] in ("", "[", ".")}

        parts = {name: part(getattr(self, name)) for name in ("types", "leaves", "sha256")}
        return dataclasses.replace(self, **parts)

    @classmethod
    def from_json(cls, content: Any) -> "Manifest":
        """What was written. Nothing of it is trusted.

        Raises:
            RefusedError: it is not what `to_json` gives.
        """
        if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
            raise RefusedError("the manifest must be a JSON object with a schema")
        if content["schema"] != SCHEMA:
            raise RefusedError(f"the manifest's schema must be {SCHEMA}, got {content['schema']}: is adamite too old?")
        rest = {key: value for key, value in content.items() if key != "sha256"}
        if content.get("sha256") != _hash(rest):
            raise RefusedError("the manifest is damaged: it does not have the SHA-256 that it says it has")
        try:
            return cls(
                step=_whole(rest["step"]),
                record=rest["record"],
                optimizer=_of(dict, rest["optimizer"]),
                types={_of(str, path): _of(str, name) for path, name in _of(dict, rest["types"]).items()},
                leaves={path: _leaf(leaf) for path, leaf in _of(dict, rest["leaves"]).items()},
                sha256={path: _of(str, leaf["sha256"]) for path, leaf in rest["leaves"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(f"the manifest is not one that adamite wrote: {error!r:.200}") from None


def types_of(tree: Any) -> dict[str, str]:
    """The names of the classes of all inner nodes, by path; where nothing is, "NoneType"."""
    found: dict[str, str] = {}

    def visit(node: Any, path: tuple[Any, ...]) -> None:
        children, _ = tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        if [key for key, _ in children] == [()]:
            return  # a leaf
        found[keystr(path)] = _type(node)
        for key, child in children:
            visit(child, (*path, *key))

    visit(unwrapped(tree), ())
    return found


def _type(node: Any) -> str:
    """The name of a class; one for all kinds of dicts, one for lists and tuples."""
    if isinstance(node, Mapping):
        return "dict"
    return "tuple" if type(node) is list else type(node).__name__


def _hash(content: dict[str, Any]) -> str:
    """Of JSON in its one canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _leaf(content: Any) -> Leaf:
    leaf = Leaf(
        tuple(map(_whole, content["shape"])),
        _of(str, content["dtype"]),
        tuple(map(_whole, content["grid"])),
        _whole(content["devices"]),
    )
    if len(leaf.grid) != len(leaf.shape) or any(k < 1 or n % k for n, k in zip(leaf.shape, leaf.grid, strict=True)):
        raise ValueError(f"an array of shape {leaf.shape} cannot be cut into {leaf.grid}")
    return leaf


def _of(kind: type[Kind], value: Any) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r:.80} is no whole number >= 0")
    return value
