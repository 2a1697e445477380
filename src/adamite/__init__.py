"""Adam for JAX: pure, composable gradient transformations that chain with Optax."""

from adamite.algorithms.adam import adam, adamw, nadam, nadamw, scale_by_adam
from adamite.engine import chain
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import bias_correction, update_moment
from adamite.regularization import add_decayed_weights, add_l1, soft_threshold

__version__ = "0.1.0"

__all__ = [
    "adam",
    "adamw",
    "add_decayed_weights",
    "add_l1",
    "bias_correction",
    "chain",
    "nadam",
    "nadamw",
    "scale_by_adam",
    "scale_by_learning_rate",
    "soft_threshold",
    "update_moment",
]
