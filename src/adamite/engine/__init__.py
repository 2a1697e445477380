"""Running any rule over a tree of arrays. Knows no algorithm."""

from adamite.engine.contract import chain, uphold
from adamite.engine.per_leaf import Rule, by_number, from_rule
from adamite.engine.weights import RoundingState, full_weights, round_weights

__all__ = ["RoundingState", "Rule", "by_number", "chain", "from_rule", "full_weights", "round_weights", "uphold"]
