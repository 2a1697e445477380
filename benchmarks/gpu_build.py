"""What `make gpu` builds and installs nowhere: the part of adamite-native that is for GPUs, in a temporary folder.

The package is the real one, with a library of three files and a custom call for CPUs that has no kernels: where a step
is traced for an unknown platform, the engine of each platform is asked.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("gpu.cc", "gpu_kernels.cc", "cuda.cc")
FOR_CPUS = """
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error Step() { return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, "there are no kernels"); }
extern "C" XLA_FFI_Error* AdamiteStep(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamiteStep, Step, xla::ffi::Ffi::Bind());
"""
EMULATION = ROOT / "tests" / "engines"


def use(folder: pathlib.Path) -> None:
    """Let this process find adamite, the emulation, and the package in the folder before one that is installed."""
    sys.path[:0] = [str(folder), str(ROOT / "src"), str(EMULATION)]


def build(folder: pathlib.Path, *, emulated: bool) -> dict[str, str]:
    """Build the package in the folder.

    Returns:
        The environment of a process that is to use it.

    Raises:
        RuntimeError: with what the compiler says.
    """
    import jax

    sys.path.insert(0, str(ROOT / "src"))
    import adamite

    package = folder / "adamite_native"
    shutil.copytree(ROOT / "native" / "src" / "adamite_native", package, ignore=shutil.ignore_patterns("__pycache__"))
    versions = {"adamite": adamite.__version__, "jax": jax.__version__}
    (package / "kernels.json").write_text(json.dumps({"built_with": versions, "kernels": {}}))
    (folder / "step.cc").write_text(FOR_CPUS)
    flags = ["g++", "-O1", "-std=c++17", "-fPIC", "-isystem", jax.ffi.include_dir(), "-c"]
    files = [folder / "step.cc", *(ROOT / "native" / "cpp" / name for name in SOURCES)]
    objects = {folder / f"{file.name}.o": [*flags, str(file)] for file in files}
    running = [
        subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for out, command in objects.items()
    ]
    said = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("the handler is not built:\n" + "\n".join(said)[-4000:])
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(package / "_native.so"), "-ldl"], check=True)
    if not emulated:
        return {}
    return _emulated().build(folder) | {"JAX_PLATFORMS": "cpu"}


def emulate() -> None:
    """Let engine "native" on this CPU be that of GPUs: the one place where the rehearsal differs from the run."""
    from adamite.engines import choice, running
    from adamite.engines.native import gpu

    def for_all(platform: str) -> Any:
        del platform
        return gpu

    _emulated().register(gpu.TARGET)
    choice.native = running.native = for_all


def _emulated() -> Any:
    """`tests/engines/emulated`."""
    if str(EMULATION) not in sys.path:
        sys.path.insert(0, str(EMULATION))
    return __import__("emulated")
