"""A GPU that is not there, for tests.

`shim.h` and `emulate.cc` make a printed kernel run on a CPU. `fake_cuda.cc` and `fake_nvrtc.cc` are a driver that
launches such kernels, and a compiler that makes them. `on_cpu.cc` lets JAX call the handlers for GPUs on a CPU. The
handlers themselves are those of adamite-native, as they are.

    environment = os.environ | emulated.build(folder)     # for a process that then calls
    emulated.register(target)
"""

import ctypes
import os
import pathlib
import subprocess

import jax

HERE = pathlib.Path(__file__).parent


def build(folder: pathlib.Path, *options: str) -> dict[str, str]:
    """The environment of a process that has such a GPU. Its libraries, built with the options, are in the folder."""
    nvrtc = folder / "nvrtc"
    nvrtc.mkdir()
    flags = ["g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options]
    commands = [
        [*flags, HERE / "fake_cuda.cc", "-o", folder / "libcuda.so.1", "-ldl"],
        [*flags, f'-DSOURCES="{HERE}"', HERE / "fake_nvrtc.cc", "-o", nvrtc / "libnvrtc.so.13"],
        [*flags, "-isystem", jax.ffi.include_dir(), HERE / "on_cpu.cc", "-o", folder / "on_cpu.so"],
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    return {
        "LD_LIBRARY_PATH": str(folder),
        "EMULATED_FOLDER": str(folder),
        "EMULATED_NVRTC": str(nvrtc / "libnvrtc.so.13"),
    }


def register(target: str) -> None:
    """Tell JAX of the handlers for GPUs, as a custom call for CPUs."""
    import adamite_native

    library = ctypes.CDLL(f"{os.environ['EMULATED_FOLDER']}/on_cpu.so")
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    for stage, capsule in adamite_native.gpu_handlers().items():
        ctypes.c_void_p.in_dll(library, stage).value = pointer(capsule, None)
    adamite_native.set_nvrtc(os.environ["EMULATED_NVRTC"])
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library.EmulatedCall), platform="cpu")


def count(what: str) -> int:
    """How many "Compilations", "Loads" and "Launches" there were in this process, or "ContextsLeft" there are."""
    name = os.environ["EMULATED_NVRTC"] if what == "Compilations" else "libcuda.so.1"
    return getattr(ctypes.CDLL(name), f"Emulated{what}")()


def options() -> str:
    """Those with which the last text was compiled."""
    text = ctypes.create_string_buffer(1000)
    ctypes.CDLL(os.environ["EMULATED_NVRTC"]).EmulatedOptions(text)
    return text.value.decode()
