"""docs/algorithms.md says what the code does: every optimizer has its row, with its bytes and its source."""

import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest

import adamite

ROOT = pathlib.Path(__file__).parent.parent
ROWS = re.findall(
    r"^\| \[`(\w+)`\]\(\.\./(\S+)\) \| (.+?) \| (\d+) \| (.+?) \| (.+?) \|$",
    (ROOT / "docs/algorithms.md").read_text(),
    re.M,
)
OPTIMIZERS = {
    name
    for name in adamite.__all__
    if callable(getattr(adamite, name))
    and next(iter(inspect.signature(getattr(adamite, name)).parameters), None) == "learning_rate"
    and not name.startswith("scale_by_")
}


def test_every_optimizer_has_its_row():
    assert [row[0] for row in ROWS] == sorted({row[0] for row in ROWS}, key=[row[0] for row in ROWS].index)
    assert {row[0] for row in ROWS} == OPTIMIZERS


@pytest.mark.parametrize(("name", "path", "direction", "size", "when", "source"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_true(name, path, direction, size, when, source):
    module = sys.modules[getattr(adamite, name).__module__]
    assert pathlib.Path(inspect.getfile(module)) == ROOT / path
    for identifier in re.findall(r"arXiv:[\d.]+\d", source) or re.findall(r"\d{4}", source):
        assert identifier in module.__doc__, identifier
    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    state = jax.eval_shape(getattr(adamite, name)(1e-3).init, leaf)
    measured = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / leaf.size
    assert round(measured, 1) == int(size)
