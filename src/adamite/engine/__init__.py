"""Running any rule over a tree of arrays. Knows no algorithm."""

from adamite.engine.contract import chain, uphold
from adamite.engine.per_leaf import Rule, from_rule

__all__ = ["Rule", "chain", "from_rule", "uphold"]
