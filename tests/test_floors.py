"""The house has floors, and imports go down: never up, never sideways between two folders."""

import ast
import pathlib
import statistics
import sys

import pytest

import adamite

ROOT = pathlib.Path(__file__).parent.parent / "src" / "adamite"
FLOORS = [
    {"numerics", "paths", "checks", "identity", "random_bits"},
    {"rounding"},
    {"storage", "engines"},
    {"core"},
    {"learning_rate", "regularization"},
    {"algorithms"},
    {"cautious", "sharding", "guards", "accumulate", "averaging", "grouping"},
    {"convert", "convert_weights", "flax", "memory", "planning", "reports", "telemetry"},
    {"checkpoint", "interop"},
    {"__init__", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))
ALLOWED = {"jax", "optax", "numpy", "adamite", *sys.stdlib_module_names}
EXTRAS = {"checkpoint": {"orbax"}, "interop": {"safetensors"}, "engines": {"adamite_native"}, "flax": {"flax"}}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def broken(path: pathlib.Path, source: str) -> list[str]:
    """The imports of one file that break a rule."""
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    wrong = []
    for module in imports(source):
        if module.split(".")[0] not in ALLOWED | EXTRAS.get(here, set()) or "._src" in module:
            wrong.append(module)
        elif module.startswith("adamite."):
            there = room_of(module)
            if there != here and (there not in FLOOR_OF or FLOOR_OF[there] > FLOOR_OF[here] or (
                FLOOR_OF[there] == FLOOR_OF[here] and (ROOT / there).is_dir()
            )):  # fmt: skip
                wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert broken(path, path.read_text()) == []


def test_every_room_has_a_floor():
    rooms = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("storage/dense.py", "from adamite.core import chain"),
        ("numerics.py", "from adamite.storage import Dense"),
        ("core/chain.py", "import adamite.algorithms.adam"),
        ("checks.py", "from adamite import adam"),
        ("learning_rate.py", "import torch"),
        ("interop/names.py", "import orbax.checkpoint"),
        ("checkpoint/saving.py", "from adamite.interop import names"),
        ("convert.py", "import adamite.checkpoint"),
        ("memory.py", "from flax import nnx"),
        ("numerics.py", "from jax._src import core"),
        ("convert.py", "from adamite.__main__ import main"),
    ],
)
def test_an_import_that_goes_up_is_seen(room, line):
    assert broken(ROOT / room, line)


def test_files_are_short():
    assert {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 300} == {}


def test_an_algorithm_is_read_in_a_sitting():
    lengths = [len(p.read_text().splitlines()) for p in (ROOT / "algorithms").glob("[a-z]*.py")]
    assert statistics.median(lengths) <= 135


def test_public_names_are_what_the_package_says():
    assert sorted(adamite.__all__) == adamite.__all__
    public = {name for name in vars(adamite) if not name.startswith("_")}
    assert public - {"algorithms", "core", "storage", "numerics", "checks"} >= set(adamite.__all__)
    for name in adamite.__all__:
        assert getattr(adamite, name).__doc__
