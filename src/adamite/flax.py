"""Training in Flax with the fused step: NNX optimizers and a Linen train state that call `tx.step`.

Constructors, attributes and states are those of Flax's classes of the same names, so that a checkpoint of one loads
into the other. Flax's classes call ``tx.update`` and `optax.apply_updates`. These classes call `tx.step`, in which a
kernel can do both in one pass.

Needs the extra ``flax``: `import adamite` alone does not.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import optax

from adamite import checks
from adamite.core.optimizer import as_optimizer

with checks.needed("adamite.flax", "flax"):
    from flax import nnx
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state

__all__ = ["ModelAndOptimizer", "Optimizer", "TrainState"]

Model = TypeVar("Model")


class Optimizer(nnx.Optimizer[Model]):
    """`flax.nnx.Optimizer`, with the fused step.

    Args:
        model: the model.
        tx: any gradient transformation. One of Optax's is stepped by its ``update``.
        wrt: a filter of NNX: the variables to train, as `nnx.grad` takes it. ``nnx.Param``, ``nnx.LoRAParam``, ...
        graph: as `flax.nnx.Optimizer` takes it. False: the model is a tree, without shared variables.

    Raises:
        TypeError: `tx` is no gradient transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import adamite
        >>> from adamite.flax import Optimizer
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = Optimizer(model, adamite.adam(0.1), wrt=nnx.Param)
        >>> @nnx.jit(donate_argnames=("model", "optimizer"))
        ... def train_step(model, optimizer):
        ...     loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(jnp.ones((1, 2))) - 3.0) ** 2))(model)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> losses = [float(train_step(model, optimizer)) for _ in range(100)]
        >>> losses[0] > 1, losses[-1] < 0.01, int(optimizer.step[...])
        (True, True, 100)
    """

    def __init__(self, model: Model, tx: optax.GradientTransformation, *, wrt: Any, graph: bool | None = None) -> None:
        super().__init__(model, checks.transformation("tx", tx), wrt=wrt, graph=graph)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] (a step has no updates to return)
        self, model: Model, grads: Any, /, *, engine: str = "auto", **extra_args: Any
    ) -> None:
        """Step the model's weights and the optimizer's state, in place.

        The one difference from `flax.nnx.Optimizer.update`: the result is None, as there is no tree of updates.

        Args:
            model: the model. Donate model and optimizer under `nnx.jit`, and nothing is copied.
            grads: the gradients of `nnx.grad`. Those outside of `wrt` are ignored. Where one is None, its weight stays.
            engine: "auto", "xla", "pallas" or "native", as `adamite.Optimizer.step` takes it. With "xla", results are
                those of `flax.nnx.Optimizer` to the bit.
            **extra_args: as the transformation takes them: ``loss=`` for `adamite.skip_spikes`.

        Raises:
            ValueError: `engine` is unknown; gradients and weights differ in structure or shape.
            TypeError: `engine` is no string.
        """
        grads, weights = (nnx.as_pure(nnx.state(tree, self.wrt, graph=self.graph)) for tree in (grads, model))
        state, extra_args = nnx.as_pure((self.opt_state, extra_args))
        weights, state = as_optimizer(self.tx).step(grads, state, weights, engine=engine, **extra_args)
        nnx.update(model, weights)
        nnx.update(self.opt_state, nnx.state(state, graph=self.graph))
        self.step[...] += 1


class ModelAndOptimizer(Optimizer[Model]):
    """`flax.nnx.ModelAndOptimizer`, with the fused step: an `Optimizer` that holds the model.

    Flax deprecates its class. New code holds model and optimizer apart.

    Args:
        model: the model.
        tx: any gradient transformation.
        wrt: a filter of NNX: the variables to train.

    Raises:
        TypeError: `tx` is no gradient transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import adamite
        >>> from adamite.flax import ModelAndOptimizer
        >>> both = ModelAndOptimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), adamite.adam(0.1))
        >>> both.update(nnx.grad(lambda model: jnp.mean(model(jnp.ones((1, 2))) ** 2))(both.model))
        >>> int(both.step[...])
        1
    """

    def __init__(self, model: Model, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param) -> None:
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(  # pyright: ignore[reportIncompatibleMethodOverride] (without the model, as in Flax)
        self, grads: Any, /, *, engine: str = "auto", **extra_args: Any
    ) -> None:
        """`Optimizer.update` of the model that is held."""
        super().update(self.model, grads, engine=engine, **extra_args)


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState`, with the fused step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import adamite
        >>> from adamite.flax import TrainState
        >>> model, x = nn.Dense(1), jnp.ones((1, 2))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=adamite.adam(0.1))
        >>> @jax.jit(donate_argnames="state")
        ... def train_step(state):
        ...     loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - 3.0) ** 2)
        ...     value, grads = jax.value_and_grad(loss)(state.params)
        ...     return state.apply_gradients(grads=grads), value
        >>> for _ in range(100):
        ...     state, loss = train_step(state)
        >>> bool(loss < 0.01), int(state.step)
        (True, 100)
    """

    def apply_gradients(
        self, *, grads: Any, engine: str = "auto", extra_args: Mapping[str, Any] | None = None, **fields: Any
    ) -> Self:
        """The train state after one step.

        Args:
            grads: tree of gradients, in the structure of ``params``. Where one is None, its parameter stays. Gradients
                under `flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT` replace their parameters, as in Flax.
            engine: "auto", "xla", "pallas" or "native", as `adamite.Optimizer.step` takes it. With "xla", results are
                those of Flax's train state to the bit.
            extra_args: what the transformation takes besides: ``{"loss": loss}`` for `adamite.skip_spikes`.
            **fields: other fields to replace, as in Flax: ``batch_stats=...`` of a subclass.

        Returns:
            The new train state. Donate the old one under jit, and nothing is copied.

        Raises:
            ValueError: `engine` is unknown; gradients and parameters differ in structure or shape.
            TypeError: `engine` is no string; a field does not exist.
        """
        overwritten = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        gradients, weights = (grads["params"], self.params["params"]) if overwritten else (grads, self.params)
        step = as_optimizer(self.tx).step
        weights, state = step(gradients, self.opt_state, weights, engine=engine, **(extra_args or {}))
        if overwritten:
            weights = {"params": weights, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=weights, opt_state=state, **fields)

    @classmethod
    def create(cls, *, apply_fn: Callable, params: Any, tx: optax.GradientTransformation, **fields: Any) -> Self:
        """The train state at step 0.

        Args:
            apply_fn: the model's ``apply``.
            params: tree of parameters.
            tx: any gradient transformation. One of Optax's is stepped by its ``update``.
            **fields: the fields of a subclass.

        Raises:
            TypeError: `tx` is no gradient transformation.
        """
        return super().create(apply_fn=apply_fn, params=params, tx=checks.transformation("tx", tx), **fields)
