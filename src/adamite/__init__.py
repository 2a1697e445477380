"""Adam for JAX: pure, composable gradient transformations that chain with Optax."""

from adamite import sharding
from adamite.accumulate import AccumulateState, accumulate
from adamite.algorithms.adabelief import adabelief, scale_by_belief
from adamite.algorithms.adagrad import adagrad, scale_by_rss
from adamite.algorithms.adam import adam, adamw, nadam, nadamw, scale_by_adam
from adamite.algorithms.adam_atan2 import adam_atan2, scale_by_adam_atan2
from adamite.algorithms.adam_mini import adam_mini, adam_mini_partition, scale_by_adam_mini
from adamite.algorithms.adamax import adamax, adamaxw, scale_by_adamax
from adamite.algorithms.ademamix import ademamix, scale_by_ademamix
from adamite.algorithms.adopt import adopt, scale_by_adopt
from adamite.algorithms.amsgrad import amsgrad, scale_by_amsgrad
from adamite.algorithms.lamb import lamb, scale_by_trust_ratio
from adamite.algorithms.laprop import laprop, scale_by_laprop
from adamite.algorithms.lion import lion, scale_by_lion
from adamite.algorithms.radam import radam, scale_by_radam
from adamite.algorithms.rmsprop import rmsprop, scale_by_rms, scale_by_stddev
from adamite.algorithms.sgd import sgd, trace
from adamite.algorithms.stable_adamw import scale_by_stable_adam, stable_adamw
from adamite.averaging import EmaState, ema_params, with_ema
from adamite.cautious import cautious
from adamite.convert import convert_moments
from adamite.convert_weights import convert_weights
from adamite.core import Optimizer, RoundingState, chain, full_weights, round_weights
from adamite.grouping import partition
from adamite.guards import SkipState, skip_nonfinite, skip_spikes
from adamite.identity import identity
from adamite.learning_rate import scale_by_learning_rate
from adamite.memory import MemoryReport, memory_report
from adamite.numerics import bias_correction, update_moment
from adamite.paths import map_with_path
from adamite.regularization import add_decayed_weights, add_l1, soft_threshold
from adamite.reports import telemetry
from adamite.storage import Quantized
from adamite.telemetry import TelemetryState, with_telemetry

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "EmaState",
    "MemoryReport",
    "Optimizer",
    "Quantized",
    "RoundingState",
    "SkipState",
    "TelemetryState",
    "accumulate",
    "adabelief",
    "adagrad",
    "adam",
    "adam_atan2",
    "adam_mini",
    "adam_mini_partition",
    "adamax",
    "adamaxw",
    "adamw",
    "add_decayed_weights",
    "add_l1",
    "ademamix",
    "adopt",
    "amsgrad",
    "bias_correction",
    "cautious",
    "chain",
    "convert_moments",
    "convert_weights",
    "ema_params",
    "full_weights",
    "identity",
    "lamb",
    "laprop",
    "lion",
    "map_with_path",
    "memory_report",
    "nadam",
    "nadamw",
    "partition",
    "radam",
    "rmsprop",
    "round_weights",
    "scale_by_adam",
    "scale_by_adam_atan2",
    "scale_by_adam_mini",
    "scale_by_adamax",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_laprop",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stable_adam",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "sgd",
    "sharding",
    "skip_nonfinite",
    "skip_spikes",
    "soft_threshold",
    "stable_adamw",
    "telemetry",
    "trace",
    "update_moment",
    "with_ema",
    "with_telemetry",
]
