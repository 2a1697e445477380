"""Who applies the step of a leaf: XLA, or kernels that run any rule, storage and rounding. They know none of them."""

from adamite.engines.choice import ENGINES, Choice, asked, asking, is_recording, recorded
from adamite.engines.leaf_step import Leaf, LeafStep, moved
from adamite.engines.running import run
from adamite.engines.sharded import told, told_shardings

__all__ = [
    "ENGINES",
    "Choice",
    "Leaf",
    "LeafStep",
    "asked",
    "asking",
    "is_recording",
    "moved",
    "recorded",
    "run",
    "told",
    "told_shardings",
]
