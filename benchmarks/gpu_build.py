"""What `make gpu` builds and installs nowhere: the part of adamite-native that is for GPUs, in a temporary folder.

The package is the real one, with a library of three files and an empty list of kernels for CPUs.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("gpu.cc", "gpu_kernels.cc", "cuda.cc")
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

    package = folder / "adamite_native"
    shutil.copytree(ROOT / "native" / "src" / "adamite_native", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels.json").write_text(json.dumps({"built_with": {}, "kernels": {}}))
    flags = ["g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-isystem", jax.ffi.include_dir()]
    objects = {folder / f"{name}.o": [*flags, "-c", str(ROOT / "native" / "cpp" / name)] for name in SOURCES}
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

    _emulated().register(gpu.TARGET)
    gpu._refused = lambda: ""
    for module in (choice, running):
        module.native = lambda _: gpu


def _emulated() -> Any:
    """`tests/engines/emulated`."""
    if str(EMULATION) not in sys.path:
        sys.path.insert(0, str(EMULATION))
    return __import__("emulated")
