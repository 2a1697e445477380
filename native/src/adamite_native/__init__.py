"""The compiled kernels of adamite for CPUs, a list of them, and what compiles and runs its kernels on NVIDIA's GPUs.

`adamite` uses it by itself.
"""

import ctypes
import functools
import importlib.util
import json
import pathlib
from typing import Any

import jax

__version__ = "0.1.0"

_HERE = pathlib.Path(__file__).parent

_CODE = 2**24
"""The most bytes of a kernel's machine code; it has some 100,000."""


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
    return jax.ffi.pycapsule(_library().AdamiteStep)


@functools.cache
def gpu_handlers() -> dict[str, Any]:
    """The XLA custom call on NVIDIA's GPUs, for `jax.ffi.register_ffi_target`: the handler of each stage."""
    library = _library()
    set_nvrtc(find_nvrtc())
    return {
        "initialize": jax.ffi.pycapsule(library.AdamiteGpuInitialize),
        "execute": jax.ffi.pycapsule(library.AdamiteGpuStep),
    }


def find_nvrtc() -> str:
    """The file of NVRTC in the packages that JAX' CUDA wheels bring; "" if there is none."""
    for package, name in (("nvidia.cu13", "libnvrtc.so.13"), ("nvidia.cuda_nvrtc", "libnvrtc.so.12")):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            if (found := pathlib.Path(folder) / "lib" / name).exists():
                return str(found)
    return ""


def set_nvrtc(path: str) -> None:
    """Say where NVRTC is, which compiles the kernels of the GPU. It is loaded when it is first wanted, and then kept.

    Args:
        path: of the library; "" leaves it to the loader, who may know it already.
    """
    _library().AdamiteGpuNvrtc(path.encode())


def compile_for_gpu(text: str, compute_capability: str, leaves: int) -> bytes:
    """Compile a kernel as a step on a GPU does; no GPU is needed.

    Args:
        text: the kernel, CUDA C++.
        compute_capability: of the GPU, as JAX's devices have it: "9.0".
        leaves: how many leaves the kernel's table has.

    Returns:
        The machine code; PTX if NVRTC does not know the GPU.

    Raises:
        RuntimeError: NVRTC was not found, or does not compile the text; with its log.
    """
    major, minor = map(int, compute_capability.split("."))
    out = ctypes.create_string_buffer(_CODE)
    size = _library().AdamiteGpuCompile(text.encode(), major, minor, leaves, out, ctypes.c_long(_CODE))
    if size < 0:
        raise RuntimeError(out.value.decode(errors="replace"))
    return out.raw[:size]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.cdll.LoadLibrary(str(_HERE / "_native.so"))
    library.AdamiteGpuCompile.restype = ctypes.c_long
    return library


@functools.cache
def _contents() -> dict[str, Any]:
    return json.loads((_HERE / "kernels.json").read_text())
