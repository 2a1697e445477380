"""The compiled kernels of adamite for CPUs: a library and a list of what is in it. `adamite` uses it by itself."""

import ctypes
import functools
import json
import pathlib
from typing import Any

import jax

__version__ = "0.1.0"

_HERE = pathlib.Path(__file__).parent


@functools.cache
def kernels() -> dict[str, dict[str, Any]]:
    """What each kernel is, by the name of its program.

    ``fixed`` are the operands that are compiled in, by their place, as the bits of a float32; ``of`` says in words
    which steps it does.
    """
    return json.loads((_HERE / "kernels.json").read_text())


@functools.cache
def handler() -> Any:
    """The XLA custom call, for `jax.ffi.register_ffi_target`."""
    return jax.ffi.pycapsule(ctypes.cdll.LoadLibrary(str(_HERE / "_native.so")).AdamiteStep)
