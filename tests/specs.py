"""Every optimizer and every part of one: what the tests that run over all of them need to know. One entry each."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import pytest

import adamite
import reference.adabelief
import reference.adagrad
import reference.adam
import reference.adam_atan2
import reference.adam_mini
import reference.adamax
import reference.ademamix
import reference.adopt
import reference.amsgrad
import reference.lamb
import reference.laprop
import reference.lion
import reference.radam
import reference.rmsprop
import reference.sgd
import reference.stable_adamw


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
    """Numeric hyperparameters and their values; every combination is tested."""
    flags: tuple[dict[str, Any], ...] = ({},)
    """Static arguments; each set is tested with the whole grid."""
    needs_params: bool = False
    full: bool = True
    """Takes a learning rate first."""
    rate: float = 1e-2
    """The learning rate of the golden trajectories, large enough for the weights' own rounding not to matter."""
    close: float = 2e-5
    """How far float32 may be from the paper, of the displacement; 2e-5 where the bits are optax's."""

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
        """The grid, point by point."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


NESTEROV = ({"nesterov": False}, {"nesterov": True})
ADAM = {"b1": (0.9, 0.0), "b2": (0.999, 0.9), "eps": (1e-8, 1e-3), "eps_root": (0.0, 1e-6)}
LION = {"b1": (0.9, 0.0), "b2": (0.99, 0.9), "weight_decay": (1e-3, 0.1)}
LION_MODES = ({"mode": "hard"}, {"mode": "smooth", "smooth_beta": 0.5}, {"mode": "refined"})
ADAGRAD = {"initial_accumulator_value": (0.1, 1.0), "eps": (1e-7, 1e-3)}
RMSPROP = {"decay": (0.9, 0.99), "eps": (1e-8, 1e-3)}
RMSPROP_FLAGS = (
    {},
    {"eps_in_sqrt": False, "bias_correction": True},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True, "eps_in_sqrt": False, "momentum": 0.5},
    # From 0 the first variance is 0 but for rounding, and the first step 1 / eps of nothing.
    {"centered": True, "bias_correction": True, "initial_scale": 1e4},
)
ADOPT_FLAGS = (*NESTEROV, {"use_clipping": False})
ADOPT = {"b1": (0.9, 0.0), "b2": (0.999, 0.9), "eps": (1e-6, 1e-3)}  # 1 - 0.9999 is off by 1.7e-4 in float32
MIX = {"b1": (0.9, 0.5), "b2": (0.999, 0.9), "b3": (0.999, 0.99), "alpha": (5.0, 2.0)}
MIX |= {"eps_root": (0.0, 1e-6), "weight_decay": (0.0, 0.1)}
RATES = {name: ADAM[name] for name in ("b1", "b2", "eps")}
OURS = RATES | {"weight_decay": (0.0, 0.1)}
ATAN2 = {name: OURS[name] for name in ("b1", "b2", "weight_decay")}
MIX_SCHEDULES = ({"b3": lambda t: 0.99 - 0.09 / (1 + 0.1 * t), "alpha": lambda t: 5.0 - 4.0 / (1 + 0.1 * t)},)
NEW: dict[str, Any] = {"needs_params": True, "rate": 0.1, "close": 2e-6}
DECAY = {"weight_decay": (1e-4, 0.1)}
BELIEF = ADAM | {"eps": (1e-16, 1e-8), "eps_root": (1e-16, 1e-6)}
AMSGRAD = tuple(
    {"bias_correction_mu": mu, "bias_correction_nu": nu} for mu, nu in itertools.product((True, False), repeat=2)
)
TORCHS = ({"max_before_correction": True}, {"max_before_correction": True, "bias_correction_mu": False})
UNCORRECTED = ({"bias_correction": False}, {"bias_correction": False, "nesterov": True})


def lion_mode(
    learning_rate: optax.ScalarOrSchedule, b1: Any = 0.9, b2: Any = 0.99, weight_decay: Any = 1e-3, **mode: Any
) -> optax.GradientTransformationExtraArgs:
    """Lion with another mode than its recipe's."""
    direction = adamite.scale_by_lion(b1, b2, **mode)
    decay, rate = adamite.add_decayed_weights(weight_decay), adamite.scale_by_learning_rate(learning_rate)
    return adamite.chain(direction, decay, rate)


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
    Spec("lion mode", lion_mode, None, reference.lion.lion, LION, LION_MODES[1:], needs_params=True),
    Spec("sgd", adamite.sgd, optax.sgd, reference.sgd.sgd),
    Spec("momentum", adamite.sgd, optax.sgd, reference.sgd.sgd, {"momentum": (0.9, 0.5)}, NESTEROV),
    Spec("adagrad", adamite.adagrad, optax.adagrad, reference.adagrad.adagrad, ADAGRAD, rate=0.1),
    Spec("scale_by_rss", adamite.scale_by_rss, optax.scale_by_rss, full=False),
    Spec("rmsprop", adamite.rmsprop, optax.rmsprop, reference.rmsprop.rmsprop, RMSPROP, RMSPROP_FLAGS, rate=0.1),
    Spec("scale_by_rms", adamite.scale_by_rms, optax.scale_by_rms, full=False),
    Spec("scale_by_stddev", adamite.scale_by_stddev, optax.scale_by_stddev, full=False),
    Spec("adopt", adamite.adopt, optax.contrib.adopt, reference.adopt.adopt, ADOPT, ADOPT_FLAGS, rate=0.1),
    Spec("ademamix", adamite.ademamix, optax.contrib.ademamix, reference.ademamix.ademamix, MIX, needs_params=True),
    Spec("laprop", adamite.laprop, None, reference.laprop.laprop, OURS, **NEW),
    Spec("adam_atan2", adamite.adam_atan2, None, reference.adam_atan2.adam_atan2, ATAN2, **NEW),
    Spec("stable_adamw", adamite.stable_adamw, None, reference.stable_adamw.stable_adamw, OURS, **NEW),
    Spec("adam_mini", adamite.adam_mini, None, reference.adam_mini.adam_mini, OURS, **NEW),
    Spec("scheduled", adamite.ademamix, None, reference.ademamix.ademamix, {"b1": (0.9, 0.5)}, MIX_SCHEDULES, True),
    Spec("lamb", adamite.lamb, optax.lamb, reference.lamb.lamb, ADAM | DECAY, needs_params=True),
]


def halved(cases: list[Any]) -> list[Any]:
    """Cases of which two of four in a row are slow: of pairs sometimes the one, sometimes the other."""
    marked = (x if hasattr(x, "marks") else pytest.param(*x) for x in cases)
    return [x if k % 4 in (0, 3) else x._replace(marks=(*x.marks, pytest.mark.slow)) for k, x in enumerate(marked)]
