"""What importing adamite costs and does."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import adamite

SOURCES = pathlib.Path(adamite.__file__).parent


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_brings_in_jax_and_optax_and_nothing_else():
    code = "import sys, optax; before = set(sys.modules); import adamite; print(*(set(sys.modules) - before))"
    new = python(code).split()
    assert {name.split(".")[0] for name in new} - {"adamite"} <= {"jax"}
    assert len([name for name in new if not name.startswith("adamite")]) <= 3


BEFORE_ANY_BACKEND = "import jax; jax.config.update('jax_num_cpu_devices', 2)"
"""JAX refuses that once a backend has started."""


def test_import_starts_no_backend():
    python("import adamite\n" + BEFORE_ANY_BACKEND)


def test_building_an_optimizer_starts_no_backend():
    python('import adamite; adamite.adamw(1e-3, weight_decay=0.1, mask={"w": True})\n' + BEFORE_ANY_BACKEND)


@pytest.mark.parametrize("room", ["checkpoint", "interop", "flax"])
def test_rooms_with_extras_are_imported_by_name_only_and_start_no_backend(room):
    code = f"import sys, adamite; print('adamite.{room}' in sys.modules); import adamite.{room}\n"
    assert python(code + BEFORE_ANY_BACKEND) == "False"


@pytest.mark.parametrize(
    ("module", "code", "by", "package"),
    [
        ("flax", "import adamite.flax", "adamite.flax", "flax"),
        ("orbax", "import adamite.checkpoint", "adamite.checkpoint", "orbax-checkpoint"),
        (
            "safetensors",
            "from adamite.interop import files; files.replace('w', {}, {})",
            "adamite.interop",
            "safetensors",
        ),
        ("safetensors", "from adamite.interop import read_torch; read_torch('w')", "adamite.interop", "safetensors"),
    ],
)
def test_a_missing_package_is_asked_for_by_name(module, code, by, package):
    code = f"import sys; sys.modules['{module}'] = None\ntry: {code}\nexcept ImportError as error: print(error)"
    assert re.fullmatch(rf"{by} needs {package} \(.+\): pip install --upgrade {package}", python(code))


MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "socket",
    "ssl",
    "http",
    "urllib",
    "requests",
    "ftplib",
}
MODULES |= {"smtplib", "subprocess", "multiprocessing", "ctypes", "importlib", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__", "system", "popen", "allow_pickle", "getenv", "environ"}


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCES)))
def test_nothing_is_unpickled_evaluated_started_or_sent(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not {module.split(".")[0] for module in modules} & MODULES
        called = node.func if isinstance(node, ast.Call) else None
        name = getattr(called, "id", "") or getattr(called, "attr", "")
        used = getattr(node, "attr", "") if getattr(getattr(node, "value", None), "id", "") == "os" else ""
        assert name not in NAMES or (name == "compile" and getattr(called.value, "id", "") == "re"), (path, node.lineno)
        assert used not in NAMES, (path, node.lineno)
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle")


@pytest.mark.few(2)
@pytest.mark.parametrize("module", ["torch", "flax", "chex", "orbax", "safetensors", "sklearn", "matplotlib"])
def test_works_without_optional_packages(module):
    code = f"import sys; sys.modules['{module}'] = None; import adamite, jax.numpy as jnp\n"
    code += "tx = adamite.adam(1e-3); print(tx.update(jnp.ones(1), tx.init(jnp.ones(1)))[0])"
    assert python(code) == "[-0.00099999]"


def test_installs_without_a_compiler(tmp_path):
    """`make .venv/native` says that there is none, and succeeds."""
    root, tools = SOURCES.parents[1], tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "find", "touch", "make"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "native").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("requirements.lock", ".venv/created", ".venv/train.installed"):
        (tmp_path / name).touch()
    shutil.copy(root / "Makefile", tmp_path)
    command = [tools / "make", ".venv/native"]
    result = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, check=True)
    assert "There is no C++ compiler (c++): XLA will take all steps" in result.stdout
    assert (tmp_path / ".venv/native").exists()


def test_steps_without_compiled_kernels():
    code = "import sys; sys.modules['adamite_native'] = None; import adamite, jax.numpy as jnp\n"
    code += "tx = adamite.adam(1e-3); print(tx.step(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))[0])"
    assert python(code) == "[0.999]"
