"""Where the state of an optimizer lives: as parameters do, spread over one more axis of the mesh, or on the host."""

from adamite.sharding.layout import Spread, state_shardings
from adamite.sharding.offloading import offload
from adamite.sharding.placing import placed
from adamite.sharding.spreading import zero1

__all__ = ["Spread", "offload", "placed", "state_shardings", "zero1"]
