"""What importing adamite costs and does."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_brings_in_jax_and_optax_and_nothing_else():
    code = "import sys, optax; before = set(sys.modules); import adamite; print(*(set(sys.modules) - before))"
    new = python(code).split()
    assert {name.split(".")[0] for name in new} - {"adamite"} <= {"jax"}
    assert len([name for name in new if not name.startswith("adamite")]) <= 3


def test_import_starts_no_backend():
    code = "import adamite; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert python(code) == "False"


def test_building_an_optimizer_starts_no_backend():
    code = """
import adamite
adamite.adamw(1e-3, weight_decay=0.1, mask={"w": True})
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert python(code) == "False"


@pytest.mark.parametrize("module", ["torch", "flax", "chex", "orbax", "sklearn", "matplotlib"])
def test_works_without_optional_packages(module):
    code = f"import sys; sys.modules['{module}'] = None; import adamite, jax.numpy as jnp\n"
    code += "tx = adamite.adam(1e-3); print(tx.update(jnp.ones(1), tx.init(jnp.ones(1)))[0])"
    assert python(code) == "[-0.00099999]"
