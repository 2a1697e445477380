"""The compiled kernels of adamite for CPUs: a library and a list of what is in it. `adamite` uses it by itself."""

import ctypes
import functools
import json
import pathlib
from typing import Any

import jax

__version__ = "0.1.0"

_HERE = pathlib.Path(__file__).parent


def kernels() -> dict[str, list[str]]:
    """In words, the steps that each kernel does, by the name of its program."""
    return _contents()["kernels"]


def built_with() -> dict[str, str]:
    """The versions of what the kernels were generated from."""
    return _contents()["built_with"]


def versions() -> dict[str, str]:
    """The versions of the same packages, as they are here."""
    import adamite

    return {"adamite": adamite.__version__, "jax": jax.__version__}


def step_of(name: str, weights: str, gradients: str) -> Any:
    """The kind of step whose program has this name, as JAX traces it now; None: no kernel is generated for it.

    Args:
        name: of a program.
        weights: the dtype of the weights.
        gradients: that of the gradients.
    """
    from adamite_native import grid

    return grid.step_of(name, weights, gradients)


@functools.cache
def handler() -> Any:
    """The XLA custom call, for `jax.ffi.register_ffi_target`."""
    return jax.ffi.pycapsule(ctypes.cdll.LoadLibrary(str(_HERE / "_native.so")).AdamiteStep)


@functools.cache
def _contents() -> dict[str, Any]:
    return json.loads((_HERE / "kernels.json").read_text())
