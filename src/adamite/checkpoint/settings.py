"""An optimizer's identity as plain numbers and words: what JSON can hold, and what can be compared years later.

Functions cannot be looked into. Of one that is a schedule, its values at some steps stand for it, to five digits; of
others the name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding

from adamite.identity import LOST, identity

SAMPLED = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
"""The steps at which a schedule is looked at."""


@functools.lru_cache(maxsize=16, typed=True)  # a tuple of its functions equals an optimizer
def settings(tx: Any) -> dict[str, Any]:
    """The identity of a transformation, of dicts, lists, strings and numbers only.

    Raises:
        ValueError: the transformation has lost its identity, or one inside of it has: any other would pass for it.
    """
    found = {name: _plain(value) for name, value in identity(tx).items()}
    if _has_lost(found):
        raise ValueError(
            "tx has lost its name and its arguments: it was built anew from the functions init and update of an "
            "optimizer of adamite. Give the optimizer itself"
        )
    return found


def _has_lost(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("name") == LOST or any(map(_has_lost, value.values()))
    return isinstance(value, list) and any(map(_has_lost, value))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (complex, jax.Array, np.ndarray, np.generic)):
        x = np.asarray(value)
        return _plain(x.item()) if x.shape == () and x.dtype.kind != "c" else f"{x.dtype.name} {x.tolist()!r:.500}"
    if isinstance(value, (Mesh, AbstractMesh)):
        return dict(value.shape)
    if isinstance(value, (Sharding, np.dtype)):
        return str(value)
    if isinstance(value, type):
        return np.dtype(value).name if issubclass(value, np.generic) else value.__name__
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    return _of_function(value) if callable(value) else type(value).__name__


def _of_function(function: Callable[..., Any]) -> Any:
    named = function.func if isinstance(function, functools.partial) else function
    name = getattr(named, "__qualname__", type(named).__name__)
    try:
        value = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            return name
        return {f"step {n}": float(f"{float(function(jnp.int32(n))):.5g}") for n in SAMPLED}
    except Exception:  # whatever a mask or a partition says to a number
        return name
