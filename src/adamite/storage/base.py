"""What the engine asks of a storage."""

from typing import Any, Protocol

import jax
from jax.tree_util import KeyPath

from adamite.random_bits import Bits


class Storage(Protocol):
    """One moment of one leaf, between steps.

    The following hold for every storage, every finite x it can hold and every stored value s:

    - ``decode(fresh(leaf))`` is exactly the initial value, 0 unless said otherwise, in a shape that fits the leaf's;
    - ``decode`` gives at least float32;
    - ``encode(x, s, bits)`` has the structure, shapes and dtypes of ``s``, so that a state never changes its type;
    - every array of ``s`` has the moment's rank, and along each axis its length, or 1, or one for each `block`.
    """

    @property
    def form(self) -> type[Any] | None:
        """The NamedTuple of arrays that a stored moment is; None: it is one array."""
        ...

    @property
    def block(self) -> int:
        """How many elements along the last axis are encoded together."""
        ...

    @property
    def seed(self) -> int | None:
        """Of the random bits; None: it needs none."""
        ...

    def fresh(self, leaf: Any, path: KeyPath = ()) -> Any:
        """The stored form of a moment that has seen no gradient yet, for a parameter like `leaf` at `path`."""
        ...

    def fits(self, shape: tuple[int, ...], leaf_shape: tuple[int, ...]) -> bool:
        """Whether a moment of that shape belongs to a parameter of that shape; mostly whether they are the same."""
        ...

    def decode(self, stored: Any) -> jax.Array:
        """The moment's values, at least float32."""
        ...

    def encode(self, x: jax.Array, stored: Any, bits: Bits) -> Any:
        """The values `x` in the form of `stored`, which is what they replace."""
        ...
