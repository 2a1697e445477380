"""Every optimizer and every part of one: what the tests that run over all of them need to know. One entry each."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import adamite
import reference.adabelief
import reference.adam
import reference.adamax
import reference.amsgrad
import reference.lion
import reference.radam


class Spec(NamedTuple):
    """One transformation."""

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    """Builds ours."""
    twin: Callable[..., optax.GradientTransformation] | None = None
    """Builds optax's, if it has one, from the same arguments."""
    paper: Callable[..., Any] | None = None
    """The path of the parameters by the paper, in float64 NumPy: of a whole optimizer."""
    grid: dict[str, tuple[float, ...]] = {}  # noqa: RUF012 (a NamedTuple's default is never written to)
    """Numeric hyperparameters and their values, the default first; every combination is tested."""
    flags: tuple[dict[str, Any], ...] = ({},)
    """Static arguments; each set is tested with the whole grid."""
    needs_params: bool = False
    full: bool = True
    """Takes a learning rate first."""

    def __str__(self) -> str:
        return self.name

    @property
    def first(self) -> tuple[float, ...]:
        return (1e-2,) if self.full else ()

    def build(self, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        return self.make(*self.first, **kwargs)

    def build_twin(self, **kwargs: Any) -> optax.GradientTransformation:
        assert self.twin
        return self.twin(*self.first, **kwargs)

    def combinations(self) -> list[dict[str, float]]:
        """The grid, point by point; the first is the default."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


ADAM = {"b1": (0.9, 0.0), "b2": (0.999, 0.9), "eps": (1e-8, 1e-3), "eps_root": (0.0, 1e-6)}
LION = {"b1": (0.9, 0.0), "b2": (0.99, 0.9), "weight_decay": (1e-3, 0.1)}
LION_MODES = ({"mode": "hard"}, {"mode": "smooth"}, {"mode": "refined"})
DECAY = {"weight_decay": (1e-4, 0.1)}
NESTEROV = ({"nesterov": False}, {"nesterov": True})
RATES = {name: ADAM[name] for name in ("b1", "b2", "eps")}
BELIEF = ADAM | {"eps": (1e-16, 1e-8), "eps_root": (1e-16, 1e-6)}
AMSGRAD = tuple(
    {"bias_correction_mu": mu, "bias_correction_nu": nu} for mu, nu in itertools.product((True, False), repeat=2)
)
TORCHS = ({"max_before_correction": True}, {"max_before_correction": True, "bias_correction_mu": False})
UNCORRECTED = ({"bias_correction": False}, {"bias_correction": False, "nesterov": True})

SPECS = [
    Spec("adam", adamite.adam, optax.adam, reference.adam.adam, ADAM, NESTEROV + UNCORRECTED),
    Spec("adamw", adamite.adamw, optax.adamw, reference.adam.adamw, ADAM | DECAY, NESTEROV, needs_params=True),
    Spec("nadam", adamite.nadam, optax.nadam, reference.adam.nadam, ADAM),
    Spec("nadamw", adamite.nadamw, optax.nadamw, reference.adam.nadamw, ADAM | DECAY, needs_params=True),
    Spec("scale_by_adam", adamite.scale_by_adam, optax.scale_by_adam, full=False),
    Spec("amsgrad", adamite.amsgrad, optax.amsgrad, reference.amsgrad.amsgrad, ADAM, AMSGRAD + TORCHS),
    Spec("scale_by_amsgrad", adamite.scale_by_amsgrad, optax.scale_by_amsgrad, full=False),
    Spec("adamax", adamite.adamax, optax.adamax, reference.adamax.adamax, RATES),
    Spec("adamaxw", adamite.adamaxw, optax.adamaxw, reference.adamax.adamaxw, RATES | DECAY, needs_params=True),
    Spec("scale_by_adamax", adamite.scale_by_adamax, optax.scale_by_adamax, full=False),
    Spec("radam", adamite.radam, optax.radam, reference.radam.radam, ADAM | {"threshold": (5.0, 4.0)}, NESTEROV),
    Spec("scale_by_radam", adamite.scale_by_radam, optax.scale_by_radam, full=False),
    Spec("adabelief", adamite.adabelief, optax.adabelief, reference.adabelief.adabelief, BELIEF, NESTEROV),
    Spec("scale_by_belief", adamite.scale_by_belief, optax.scale_by_belief, full=False),
    Spec("lion", adamite.lion, optax.lion, reference.lion.lion, LION, needs_params=True),
    Spec("scale_by_lion", adamite.scale_by_lion, optax.scale_by_lion, None, {}, LION_MODES, full=False),
]
