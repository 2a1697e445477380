"""The learning rates inside of a transformation, whatever is around them.

Two functions close over what they know, and nothing shows from outside. But whatever wraps a transformation calls its
`init`. So `adamite.scale_by_learning_rate`, which is a part of every optimizer of adamite, notes its number or schedule
when its state is made, and `learning_rates` runs `init` on abstract arrays and finds where in the state that is.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from jax.tree_util import DictKey, GetAttrKey, KeyPath, tree_flatten_with_path

INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
"""They hold the numbers that the transformation inside is built with anew at each step."""

STATES = (optax.ScaleByScheduleState, optax.EmptyState)
"""The states of a learning rate: of a schedule, and of a number."""


Rates = dict[str, Callable[[Any], Any]]
"""By label of `optax.partition`, "" outside of any: ``rate(state)``, of the next step, for a state of the whole."""


_noted: contextvars.ContextVar[list[tuple[Any, Any]] | None] = contextvars.ContextVar("adamite_rates", default=None)


def note_rate(rate: Any, state: Any) -> None:
    """Note a number or a schedule, and the state that was made for it."""
    noted = _noted.get()
    if noted is not None:
        noted.append((rate, state))


def learning_rates(init: Callable[[Any], Any], params: Any) -> Rates:
    """The learning rates of a transformation of adamite's, and those of adamite's inside of others.

    Left out is what is not certain: what `optax.inject_hyperparams` injects, for it may change; several on one path,
    which together are none of them; and what some wrapper has put where it cannot be found.

    Args:
        init: that of the transformation.
        params: tree of parameters, or of gradients.
    """
    found: list[tuple[tuple[str, ...], Callable[[Any], Any]]] = []

    def probe(params: Any) -> None:
        with _noting() as noted:
            nodes, _ = tree_flatten_with_path(init(params), is_leaf=_is_node)
        for index, (path, node) in enumerate(nodes):
            found.extend((labels(path), _reader(index, rate)) for rate, state in noted if state is node)

    jax.eval_shape(probe, params)
    alone = [
        (path, rate) for path, rate in found if sum(path[: len(other)] == other[: len(path)] for other, _ in found) == 1
    ]
    return {"/".join(path): rate for path, rate in alone}


class RatesOf:
    """`learning_rates` of a transformation, looked for once for each structure that its state has."""

    def __init__(self, init: Callable[[Any], Any]) -> None:
        """Of the transformation with this `init`."""
        self.init, self.found = init, {}

    def __reduce__(self) -> Any:
        """It is sent to another process without what was found in this one."""
        return RatesOf, (self.init,)

    def __call__(self, state: Any, like: Any) -> Rates:
        """For a state of it; `like` is a tree of parameters or gradients."""
        structure = jax.tree.structure(state)
        if structure not in self.found:
            self.found[structure] = learning_rates(self.init, like)
        return self.found[structure]


def labels(path: KeyPath) -> tuple[str, ...]:
    """The labels of `optax.partition` on a path through a state, the outer ones first."""
    return tuple(
        str(inner.key)
        for outer, inner in itertools.pairwise(path)
        if isinstance(outer, GetAttrKey) and outer.name == "inner_states" and isinstance(inner, DictKey)
    )


def _is_node(node: Any) -> bool:
    return isinstance(node, (*STATES, *INJECTED))


def _reader(index: int, rate: Any) -> Callable[[Any], Any]:
    def read(state: Any) -> Any:
        node = jax.tree.leaves(state, is_leaf=_is_node)[index]
        return rate(node.count) if callable(rate) else rate

    return read


@contextlib.contextmanager
def _noting() -> Iterator[list[tuple[Any, Any]]]:
    noted: list[tuple[Any, Any]] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)
