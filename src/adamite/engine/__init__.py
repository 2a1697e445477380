"""Running any rule over a tree of arrays. Knows no algorithm."""

from adamite.engine.contract import chain, uphold
from adamite.engine.per_leaf import Rule, Step, from_rule

__all__ = ["Rule", "Step", "chain", "from_rule", "uphold"]
