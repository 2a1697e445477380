"""States that older versions wrote: they load, and go on as they went on then."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamite
from adamite.checkpoint import read_manifest, restore

FOLDER = Path(__file__).parents[1] / "fixtures" / "states"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("states", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_version_is_there():
    assert adamite.__version__ in VERSIONS


def loaded(version, make):
    there = {path.split("'")[1] for path in read_manifest(FOLDER / version).leaves}
    assert there <= make.KINDS.keys()
    like = {}
    for name in there:
        tx, params = make.start(name)
        like[name] = params, jax.eval_shape(tx.init, params), params
    return restore(FOLDER / version, like).tree


@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_of_that_version_loads(version, make):
    assert len(loaded(version, make)) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_of_that_version_goes_on(version, make):
    for name, (params, state, after) in loaded(version, make).items():
        found, _ = make.stepped(make.start(name)[0], params, state, 3)
        for ours, theirs, before in zip(*map(jax.tree.leaves, (found, after, params)), strict=True):
            step = np.abs(np.asarray(theirs, np.float32) - np.asarray(before, np.float32)).max()
            unit = np.abs(np.asarray(theirs, np.float32)).max() * float(jnp.finfo(theirs.dtype).eps)
            # Another processor may round elsewhere: a code more or less, a weight's neighbour.
            np.testing.assert_allclose(
                np.asarray(ours, np.float32),
                np.asarray(theirs, np.float32),
                rtol=0,
                atol=0.02 * step + unit,
                err_msg=name,
            )
