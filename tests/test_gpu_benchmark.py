"""`make gpu`, rehearsed without a GPU: each of its parts runs, and none finds another number."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.more
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds what is emulated")
def test_rehearsal(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--emulated", "--budget", "1800", "--out", tmp_path]
    environment = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-emulated.json").read_text())
    assert (found["failures"], found["left out"]) == ([], [])
    rows = found["rows"]
    assert set(rows) == {"nvrtc", "bits", "races", "ways", "warm", "steps", "training", "xla"}
    for row in rows["bits"]:
        assert row["plain, emulated"] == row["odd, emulated"] == row["plain, jitted"] == row["odd, jitted"] == 0, row
    assert not any(row["others"] for row in rows["races"])
    assert not any(row.get("differ") for row in rows["ways"])
