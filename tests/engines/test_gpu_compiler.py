"""What compilers make of steps on a GPU: no figure is worse than those that are committed.

The compilers are no requirement: `make test-more` fetches them.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_compiler.py"
COMPILERS = pathlib.Path(sys.prefix) / "gpu-compiler"
LEAF, GPT2 = "one leaf of 16384 x 16384", "GPT-2 small, 148 leaves"


@pytest.mark.more
@pytest.mark.skipif(not COMPILERS.exists(), reason="make test-more fetches the compilers for GPUs")
def test_no_figure_is_worse(tmp_path):
    path = os.pathsep.join(map(str, (COMPILERS, ROOT / "src")))
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": ""}
    out = tmp_path / "figures.json"
    script = [sys.executable, str(SCRIPT), "--check", "--out", str(out)]
    run = subprocess.run(script, env=os.environ | own, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(out.read_text())["sections"]
    # What must be counted, if the counting is right: weights, gradients and moments, read or written seven times.
    assert found[LEAF]["optax.adamw, float32"]["moved"] == pytest.approx(28, rel=1e-4)
    assert found[GPT2]["optax.adamw, float32"]["moved"] == pytest.approx(28, rel=1e-4)
    assert found[GPT2]["optax.adamw, float32"]["launches"] >= 148
    assert len(found["kernels"]) == 18
    assert {name: row["spilled bytes"] for name, row in found["kernels"].items() if row["spilled bytes"]} == {}
    assert all(row["moved"] < 28.1 for row in found["kernels"].values())


@pytest.fixture(scope="module")
def gpu_compiler():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def test_a_figure_is_worse_where_it_is_larger_or_was_not_committed(gpu_compiler):
    then = {"a": {"moved": 28.0, "launches": 3, "compile s": 1.0}}
    now = {"a": {"moved": 28.5, "launches": 2, "compile s": 9.0}, "b": {"registers": 40}}
    assert gpu_compiler.worse(then, then) == []
    larger, new = gpu_compiler.worse(now, then)
    assert larger == "a: moved is 28.5, and was 28"
    assert new.startswith("b: registers is 40")


def test_figures_of_another_compiler_are_not_compared(gpu_compiler, capsys):
    committed = json.loads(gpu_compiler.COMMITTED.read_text())
    worse = {LEAF: {"optax.adamw, float32": {"moved": 29.0}}, "kernels": {"a": {"registers": 40}}}
    assert not gpu_compiler.passes(committed, worse)
    assert "2 figures are worse" in capsys.readouterr().out
    assert gpu_compiler.passes(committed | {"xla": {"jax": "0.1"}, "nvrtc": {"nvidia-cuda-nvrtc": "1.0"}}, worse)
    assert "compared 0 rows" in capsys.readouterr().out
