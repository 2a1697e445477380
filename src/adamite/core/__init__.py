"""Running any rule over a tree of arrays. Knows no algorithm."""

from adamite.core.chain import chain, uphold
from adamite.core.optimizer import Optimizer, as_optimizer, optimizer
from adamite.core.rounding_part import RoundingState, full_weights, round_weights, rounds_weights
from adamite.core.rule_part import Rule, by_number, from_rule

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
