"""Running any rule over a tree of arrays. Knows no algorithm."""

from adamite.engine.contract import chain, uphold
from adamite.engine.optimizer import Optimizer, as_optimizer, optimizer
from adamite.engine.per_leaf import Rule, by_number, from_rule
from adamite.engine.weights import RoundingState, full_weights, round_weights, rounds_weights

__all__ = [
    "Optimizer",
    "RoundingState",
    "Rule",
    "as_optimizer",
    "by_number",
    "chain",
    "from_rule",
    "full_weights",
    "optimizer",
    "round_weights",
    "rounds_weights",
    "uphold",
]
