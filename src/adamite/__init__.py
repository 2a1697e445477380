"""Adam for JAX: pure, composable gradient transformations that chain with Optax."""

from adamite.algorithms.adabelief import adabelief, scale_by_belief
from adamite.algorithms.adagrad import adagrad, scale_by_rss
from adamite.algorithms.adam import adam, adamw, nadam, nadamw, scale_by_adam
from adamite.algorithms.adamax import adamax, adamaxw, scale_by_adamax
from adamite.algorithms.ademamix import ademamix, scale_by_ademamix
from adamite.algorithms.adopt import adopt, scale_by_adopt
from adamite.algorithms.amsgrad import amsgrad, scale_by_amsgrad
from adamite.algorithms.lamb import lamb, scale_by_trust_ratio
from adamite.algorithms.lion import lion, scale_by_lion
from adamite.algorithms.radam import radam, scale_by_radam
from adamite.algorithms.rmsprop import rmsprop, scale_by_rms, scale_by_stddev
from adamite.algorithms.sgd import sgd, trace
from adamite.engine import chain
from adamite.learning_rate import scale_by_learning_rate
from adamite.numerics import bias_correction, update_moment
from adamite.regularization import add_decayed_weights, add_l1, soft_threshold

__version__ = "0.1.0"

__all__ = [
    "adabelief",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "add_decayed_weights",
    "add_l1",
    "ademamix",
    "adopt",
    "amsgrad",
    "bias_correction",
    "chain",
    "lamb",
    "lion",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "sgd",
    "soft_threshold",
    "trace",
    "update_moment",
]
