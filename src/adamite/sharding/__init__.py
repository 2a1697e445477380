"""Where an optimizer's state lives: beside the parameters, spread over one more axis of the mesh, or with the host."""

from adamite.sharding.layout import Spread, state_shardings
from adamite.sharding.offloading import offload
from adamite.sharding.spreading import zero1

__all__ = ["Spread", "offload", "state_shardings", "zero1"]
