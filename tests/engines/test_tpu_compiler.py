"""What the TPU's compiler makes of the kernel: it takes every step, and moves no byte more than it must.

The compiler is no requirement: `make test-more` fetches it.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
MOST = {
    "float32, None": 28.1,
    "bfloat16, None": 20.5,
    "int8, None": 16.6,
    "int8, residual8": 12.6,
    "bfloat16, stochastic": 14.1,
    "int8, stochastic": 10.6,
    "vectors": 40.0,
}
"""Bytes moved for a parameter of a leaf of 16384 x 16384, or of vectors: XLA moves some of them to its fast memory."""


@pytest.mark.skipif(not LIBRARY.exists(), reason="make test-more fetches the TPU's compiler")
def test_every_step_compiles_and_moves_what_it_must():
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": str(LIBRARY), "XLA_FLAGS": ""}
    own["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests", "benchmarks"))
    script = [sys.executable, str(pathlib.Path(__file__).with_name("tpu_compiler.py"))]
    run = subprocess.run(script, env=os.environ | own, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {row.pop("case"): row for row in map(json.loads, run.stdout.splitlines())}
    assert {case: row["error"] for case, row in found.items() if "error" in row} == {}
    assert len(found) >= 49
    assert all(row["kernels"] == row["leaves"] for row in found.values())
    assert found["vectors"]["texts"] == 1  # so that XLA compiles one kernel
    assert {case: found[case]["moved"] for case, most in MOST.items() if found[case]["moved"] > most} == {}
    assert {case: found[case]["beside"] for case in MOST if found[case]["beside"] > 0.05} == {}
