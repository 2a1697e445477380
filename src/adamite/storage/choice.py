"""Which storage keeps which moment: what `moments=` may be."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr

from adamite.random_bits import Bits
from adamite.storage.blockwise import Blockwise, Quantized, as_it_is
from adamite.storage.dense import Dense

NAMES: Mapping[str, Any] = {
    "float32": Dense(),
    "bfloat16": Dense(jnp.dtype(jnp.bfloat16), seed=0),
    "int8": Blockwise(),
    "float8": Blockwise(float8=True),
}
BY_LEAF = ("float32", "bfloat16", "int8")


def choose(moments: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The storage of each moment of an algorithm.

    Args:
        moments: a name in `NAMES`, a storage, a pair of these, or a function from a leaf's path and the leaf to a name
            or a pair of names. The first of a pair is for means of gradients, the second for moments that are >= 0.
        defaults: how each moment is kept for "float32", by its field's name: `Dense`, but for a moment that no other
            storage can keep.

    Raises:
        ValueError: the name is unknown; a dtype was given as well.
        TypeError: `moments` is something else.
    """
    if isinstance(moments, str) and moments == "float32":
        return dict(defaults)
    pair = _pair(moments)
    storages = [_storage(chosen, moments) for chosen in pair]
    if any(default.dtype is not None for default in defaults.values()):
        raise ValueError(f"moments and mu_dtype (accumulator_dtype) exclude each other, got moments={moments!r:.80}")
    if isinstance(pair[0], str) and pair[0] == "float8" and not all(m.unsigned for m in defaults.values()):
        raise ValueError("moments='float8' has no sign, it is for means of squares: use ('int8', 'float8')")
    return {name: storages[moment.unsigned].like(moment) for name, moment in defaults.items()}


def _pair(moments: Any) -> tuple[Any, Any]:
    """What is for means of gradients, and what is for moments that are >= 0."""
    return tuple(moments) if isinstance(moments, (tuple, list)) and len(moments) == 2 else (moments, moments)


def _storage(chosen: Any, moments: Any) -> Any:
    if isinstance(chosen, str):
        if chosen not in NAMES:
            raise ValueError(f"moments must be one of {', '.join(map(repr, NAMES))}, got {chosen!r:.80}")
        return NAMES[chosen]
    if hasattr(chosen, "like") and not isinstance(chosen, type):
        return chosen
    if callable(chosen) and not isinstance(chosen, type):
        return ByLeaf(chosen)
    raise TypeError(
        "moments must be a name, a storage, a pair of these or a function of path and leaf, "
        f"got {moments!r:.80} of type {type(moments).__name__}"
    )


@dataclasses.dataclass(frozen=True)
class ByLeaf:
    """A name for each leaf. The state has one form for all, `Quantized`; in it a leaf says by its dtype what it is."""

    choice: Callable[[KeyPath, Any], Any]
    unsigned: bool = False
    initial: jax.typing.ArrayLike = 0.0
    seed = 0
    block = Blockwise.block
    form = Quantized

    def fresh(self, leaf: Any, path: KeyPath = ()) -> Quantized:
        """The initial value, in the form that the function says."""
        name = _pair(self.choice(path, leaf))[self.unsigned]
        if not isinstance(name, str) or name not in BY_LEAF:
            allowed = ", ".join(map(repr, BY_LEAF))
            raise ValueError(f"moments of params{keystr(path)} must be one of {allowed}, got {name!r:.80}")
        stored = NAMES[name].like(self).fresh(leaf, path)
        return stored if isinstance(stored, Quantized) else as_it_is(stored)

    def like(self, moment: Dense) -> "ByLeaf":
        """This storage for a moment like that one."""
        return dataclasses.replace(self, unsigned=moment.unsigned, initial=moment.initial)

    def fits(self, shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
        """Whether the two are the same."""
        return shape == leaf_shape

    def decode(self, stored: Quantized) -> jax.Array:
        """The values, at least float32."""
        return self._any.decode(stored)

    def encode(self, x: jax.Array, stored: Quantized, bits: Bits) -> Quantized:
        """The values in the form of `stored`."""
        return self._any.encode(x, stored, bits)

    @property
    def _any(self) -> Blockwise:
        return Blockwise(unsigned=self.unsigned)
