"""A gradient transformation that can take its step by itself, in one pass over memory where an engine has one.

    params, state = tx.step(grads, state, params)

is ``update`` and then ``optax.apply_updates``, in whose place a kernel may come. The state is the same either way.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jax.tree_util import keystr

from adamite import checks
from adamite.engines import ENGINES, asking, moved, recorded
from adamite.numerics import is_none
from adamite.paths import leaves_with_path

Params = TypeVar("Params")

Take = Callable[[Any, optax.OptState, Any, str, dict[str, Any]], tuple[Any, optax.OptState]]
"""``take(grads, state, params, engine, extra_args) -> (params, state)``."""


@jax.tree_util.register_static
class Optimizer(optax.GradientTransformationExtraArgs):
    """A transformation of Optax, ``init`` and ``update``, with one method more.

    In a tree it is a node without leaves and not a tuple of two functions: `jax.jit` and `equinox.filter_jit` take it
    as an argument, or as part of one, and give it back whole.
    """

    take: Take | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every kind of optimizer is such a node."""
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def step(
        self,
        grads: Any,
        state: optax.OptState,
        params: Params,
        *,
        engine: str = "auto",
        **extra_args: Any,
    ) -> tuple[Params, optax.OptState]:
        """The parameters and the state after one step.

        Args:
            grads: tree of gradients; where one is None, its parameter and its moments stay.
            state: the optimizer's state.
            params: tree of parameters, of shapes like the gradients'; where a gradient is None, anything may stand: a
                whole Equinox model will do. Donate state and parameters under jit, and nothing is copied.
            engine: "auto", "xla", "pallas" or "native". With "xla" results are those of ``update`` (of the same
                engine) and ``optax.apply_updates`` to the bit. A run may change engines at any step. Which engine takes
                which leaf, `adamite.memory_report` tells.
            **extra_args: as `update` takes them.

        Returns:
            ``(params, state)``.

        Raises:
            ValueError: `engine` is unknown; what `update` raises.
            TypeError: `engine` is no string; what `update` raises.

        Example:
            >>> import jax
            >>> import jax.numpy as jnp
            >>> from adamite import adam
            >>> tx, params = adam(0.1), jnp.zeros(2)
            >>> state = tx.init(params)
            >>> for _ in range(200):
            ...     grads = jax.grad(lambda p: jnp.sum((p - 3.0) ** 2))(params)
            ...     params, state = tx.step(grads, state, params)
            >>> print(params.round(2))
            [3. 3.]
        """
        engine = checks.one_of("engine", engine, ENGINES)
        if params is None:
            raise TypeError("params must be the tree of parameters, got None: call step(grads, state, params)")
        weights: Any = params  # any tree, of which Optax's types know some
        if self.take is not None and engine != "xla":
            return self.take(grads, state, weights, engine, extra_args)
        with asking(engine):
            updates, state = self.update(grads, state, weights, **extra_args)
        return apply_updates(weights, updates), state


def optimizer(init: Any, update: Any, take: Take | None = None) -> Optimizer:
    """The transformation; `take` is its step, where it is more than ``update`` and the sum."""
    tx = Optimizer(init, update)
    tx.take = take
    return tx


def engines_of(
    tx: optax.GradientTransformation, state: Any, params: optax.Params, engine: str
) -> list[tuple[str, str]]:
    """The engine of each parameter in a jitted step, and why it is XLA where it is.

    Args:
        tx: any transformation.
        state: its state, abstract or not.
        params: tree of parameters, the like.
        engine: as `Optimizer.step` takes it.
    """
    engine = checks.one_of("engine", engine, ENGINES)
    step = functools.partial(as_optimizer(tx).step, engine=engine)
    leaves = {keystr(path): p for path, p in leaves_with_path(params)}
    with recorded({path: getattr(p, "sharding", None) for path, p in leaves.items()}) as choices:
        jax.eval_shape(step, params, state, params)
    by_kernel = {path: (name, why) for path, name, why in choices if name != "xla"}
    by_xla = {path: (name, why) for path, name, why in reversed(choices) if name == "xla"}
    why = "it was asked for" if engine == "xla" else "it is stepped by a transformation that is not adamite's"
    return [by_kernel.get(path) or by_xla.get(path) or ("xla", why) for path in leaves]


def as_optimizer(tx: optax.GradientTransformation) -> Optimizer:
    """Any transformation, with the method."""
    return tx if isinstance(tx, Optimizer) else optimizer(tx.init, optax.with_extra_args_support(tx).update)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`, in which a parameter without an update stays."""
    return jax.tree.map(lambda u, p: p if u is None else moved(p, u), updates, params, is_leaf=is_none)
