"""What of JAX is used that JAX does not promise: each use has a reason here, and a new one fails.

JAX keeps what its reference documents for three months after a deprecation. `jax.experimental`, `jax.extend` and what
is left of `jax.core` may change with any release, and so may the form of a jaxpr.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "native").glob("*.py")])
FILES += sorted((ROOT / "native" / "src").rglob("*.py"))

UNPROMISED = {"_src", "core", "experimental", "extend", "interpreters", "lib"}
JAXPR = {"constvars", "eqns", "get_bind_params", "invars", "jaxpr", "outvars", "primitive"}

USES = {
    ("src/adamite/numerics.py", "jax.core.Tracer"): "there is no public way to ask whether an array is traced",
    ("src/adamite/checkpoint/hashing.py", "jax.experimental.multihost_utils"): "the documented way to gather hashes",
    ("src/adamite/engines/deferred.py", "jax.extend.core.Primitive"): "a function that is traced when it is lowered",
    ("src/adamite/engines/deferred.py", "jax.interpreters.batching"): "as above",
    ("src/adamite/engines/deferred.py", "jax.interpreters.mlir"): "as above",
    **{
        ("src/adamite/engines/partitioned.py", f"jax.experimental.custom_partitioning.{name}"): "no other way to know"
        for name in ("ArrayMapping", "CompoundFactor", "SdyShardingRule", "custom_partitioning")
    },
    ("src/adamite/engines/pallas.py", "jax.experimental.pallas"): "kernels for TPUs are written in Pallas",
    ("src/adamite/engines/pallas.py", "jax.experimental.pallas.tpu"): "its part for TPUs",
    ("src/adamite/engines/native/writing.py", "jax.extend.core.ClosedJaxpr"): "a program is written down from a jaxpr",
    ("src/adamite/engines/native/writing.py", "jax.extend.core.Jaxpr"): "as above",
    ("src/adamite/engines/native/writing.py", "jax.extend.core.Literal"): "as above",
    (
        "src/adamite/engines/native/program.py",
        "jax.extend.core.ClosedJaxpr",
    ): "a program's operands are computed by one",
    ("src/adamite/engines/native/program.py", "jax.extend.core.jaxpr_as_fun"): "as above",
    ("src/adamite/engines/native/writing.py", "a jaxpr"): "a program is written down from one",
    ("src/adamite/engines/products.py", "a jaxpr"): "sums of products are found in one; rules stay plain functions",
}


def name_of(node: ast.AST) -> str:
    """Of ``a.b.c``; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    before = name_of(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def uses(source: str) -> set[str]:
    """The unpromised names that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [name_of(node)]
            if isinstance(node, ast.Attribute) and node.attr in JAXPR:
                found.add("a jaxpr")
        found |= {n for n in names if n.split(".")[0] == "jaxlib"}
        found |= {n for n in names if n.startswith("jax.") and n.split(".")[1] in UNPROMISED}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_use_has_a_reason(path):
    name = path.relative_to(ROOT).as_posix()
    assert uses(path.read_text()) == {use for file, use in USES if file == name}


def test_every_reason_has_a_file():
    assert {file for file, _ in USES} <= {path.relative_to(ROOT).as_posix() for path in FILES}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from jax._src import core", {"jax._src.core"}),
        ("import jaxlib.xla_client", {"jaxlib.xla_client"}),
        ("import jax\nx = jax.experimental.io_callback(f)", {"jax.experimental", "jax.experimental.io_callback"}),
        ("from jax import lax\nfor eqn in closed.eqns: pass", {"a jaxpr"}),
        ("from jax.sharding import Mesh\nimport jax.numpy as jnp\njax.lax.add(x.core, 1)", set()),
    ],
)
def test_the_test_sees(source, found):
    assert uses(source) == found
