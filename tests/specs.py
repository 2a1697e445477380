"""Every optimizer and every part of one, a line each: what the contract's tests run over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import adamite


class Spec(NamedTuple):
    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    """Builds ours with the arguments of the test."""
    twin: Callable[..., optax.GradientTransformation]
    """Builds optax's, the same arguments."""
    needs_params: bool = False
    full: bool = True
    """Takes a learning rate first."""

    def __str__(self) -> str:
        return self.name

    def build(self, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        return self.make(*self.first, **kwargs)

    def build_twin(self, **kwargs: Any) -> optax.GradientTransformation:
        return self.twin(*self.first, **kwargs)

    @property
    def first(self) -> tuple[float, ...]:
        return (1e-2,) if self.full else ()


SPECS = [
    Spec("adam", adamite.adam, optax.adam),
    Spec("adamw", adamite.adamw, optax.adamw, needs_params=True),
    Spec("nadam", adamite.nadam, optax.nadam),
    Spec("nadamw", adamite.nadamw, optax.nadamw, needs_params=True),
    Spec("scale_by_adam", adamite.scale_by_adam, optax.scale_by_adam, full=False),
]
