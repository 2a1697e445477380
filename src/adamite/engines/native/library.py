"""The compiled kernels of adamite-native, if that is installed."""

import functools
from types import ModuleType


@functools.cache
def library() -> ModuleType | None:
    """The package; None without it."""
    try:
        import adamite_native  # pyright: ignore[reportMissingImports]  # a package of its own
    except ImportError:
        return None
    return adamite_native
