"""The custom call for GPUs, run to its end on a CPU: its driver and its compiler are replaced, and no part of itself.

The cases are in `emulated/handler_cases.py`. Those of one process run one after the other.
"""

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from engines import emulated

pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")

from engines.emulated import calls, handler_cases

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds what is emulated")

ROOT = pathlib.Path(__file__).parents[2]
CASES = [name.removeprefix("case_") for name in vars(handler_cases) if name.startswith("case_")]
OF_THEIR_OWN = {
    "many_leaves_with_an_old_driver": {"EMULATED_DRIVER": "12000"},
    "driver_is_not_there": {"LD_LIBRARY_PATH": ""},
}
"""Cases that need another machine than the others, and what is different there."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    plain = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    plain |= {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    return plain | emulated.build(tmp_path_factory.mktemp("emulated"))


def failures(environment, *cases):
    command = [sys.executable, "-m", "engines.emulated.handler_cases", *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_handler(environment):
    """What is wrong in each case: nothing."""
    cases = [case for case in CASES if case not in OF_THEIR_OWN]
    assert len(cases) > 10
    failed = failures(environment, *cases)
    assert not failed, "\n".join(failed.values())


@pytest.mark.parametrize("case", OF_THEIR_OWN)
def test_handler_on_another_machine(environment, case):
    if case == "driver_is_not_there" and _is_there("libcuda.so.1"):
        pytest.skip("there is a driver")
    failed = failures(environment | OF_THEIR_OWN[case], case)
    assert not failed, "\n".join(failed.values())


def test_threads_find_kernels_without_a_race(tmp_path):
    """Of what is not XLA's, which the sanitizer of threads does not know: `FindKernel`."""
    race, threads, source = tmp_path / "race", ["-fsanitize=thread", "-g"], ROOT / "native" / "cpp"
    files = [emulated.HERE / "race.cc", source / "gpu_kernels.cc", source / "cuda.cc"]
    subprocess.run(["g++", "-std=c++17", "-O1", *threads, f"-I{source}", *files, "-o", race, "-ldl"], check=True)
    plain = {name: x for name, x in os.environ.items() if name != "LD_PRELOAD"}  # another sanitizer
    environment = plain | emulated.build(tmp_path, *threads)
    texts = [tmp_path / f"{k}.txt" for k in range(3)]
    for k, text in enumerate(texts):
        text.write_text(f"{calls.KERNEL}// {k}\n")
    done = subprocess.run([race, "4", *texts], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def _is_there(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
