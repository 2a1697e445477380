"""How one moment is kept between steps. A storage knows nothing of algorithms, trees or devices."""

from adamite.storage.base import Storage
from adamite.storage.blockwise import Blockwise, Quantized
from adamite.storage.choice import choose
from adamite.storage.dense import Dense
from adamite.storage.per_block import PerBlock

__all__ = ["Blockwise", "Dense", "PerBlock", "Quantized", "Storage", "choose"]
