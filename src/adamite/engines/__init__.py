"""Whole steps in one pass over memory: kernels that run any rule, storage and rounding. They know none of them."""

from adamite.engines.choice import ENGINES, Choice, choose, recorded, take, unwanted
from adamite.engines.leaf_step import Fused, Leaf, split

__all__ = ["ENGINES", "Choice", "Fused", "Leaf", "choose", "recorded", "split", "take", "unwanted"]
