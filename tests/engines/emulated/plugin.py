"""A pytest plugin: the engine for GPUs takes the steps on CPUs, by a GPU that is emulated.

``pytest -p engines.emulated.plugin``, in the environment of `emulated.build`.
"""

from adamite.engines import choice, running
from adamite.engines.native import gpu
from engines import emulated


def pytest_configure() -> None:
    """Put one engine in the place of the other."""
    emulated.register(gpu.TARGET)
    gpu._refused = lambda: ""
    choice.native = running.native = lambda platform: gpu
