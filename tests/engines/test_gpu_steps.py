"""Other tests once more, with the engine for GPUs in the place of that for CPUs, by a GPU that is emulated.

Sharded leaves, meshes of Auto and Explicit axes, scan, vmap, derivatives, guards, checkpoints and NNX go through it.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from engines import emulated

pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")

ROOT = pathlib.Path(__file__).parents[2]
FILES = ["tests/engines/test_partitioned.py", "tests/engines/test_updates.py", "tests/test_placed.py"]
OF_CPUS = (
    "test_every_storage_rounding_and_dtype",  # which leaves have no kernel
    "test_nothing_is_copied_where_all_is_donated",  # an update lies over the gradient
)


@pytest.mark.more
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds what is emulated")
def test_steps_by_an_emulated_gpu(tmp_path):
    environment = os.environ | emulated.build(tmp_path) | {"PYTHONPATH": str(ROOT / "tests")}
    options = [
        "-p",
        "engines.emulated.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "-n",
        "0",
        "-m",
        "not slow and not more",
    ]
    chosen = ["-k", " and ".join(f"not {name}" for name in OF_CPUS)]
    command = [sys.executable, "-m", "pytest", *options, *chosen, *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
