"""Manifests changed at random, resealed so that their SHA-256 is right: what `restore` does before it reads an array.

Either it refuses in its own words, or what it would read is what was expected. 100,000 of them by `make test-all`.
"""

import copy
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adamite
from adamite.checkpoint.leaves import describe, leaves_of
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.plan import planned
from adamite.checkpoint.settings import settings as settings_of
from adamite.checks import RefusedError

pytestmark = pytest.mark.more

TX = adamite.rmsprop(1e-3, moments="int8", rounding="residual8")
PARAMS = {"w": jnp.ones((16, 256), jnp.bfloat16), "b": jnp.ones(3)}
TOLD = settings_of(TX)
LIKE = jax.eval_shape(lambda: (PARAMS, TX.init(PARAMS)))
LEAVES = {path: describe(leaf) for path, leaf in leaves_of(LIKE).items()}
GOOD = Manifest(3, {"a": 1}, TOLD, types_of(LIKE), LEAVES, dict.fromkeys(LEAVES, "00" * 32)).to_json()
ALLOWED = [
    set(),
    {"storage"},
    {"dtype"},
    {"weights"},
    {"['w']"},
    {"storage", "dtype", "mesh", "weights", "optimizer"},
    {"storage", "dtype", "mesh", "weights", "optimizer", "['b']", "tree[1][0]"},
]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, 2**200, -1, 1e300, float("nan"), float("inf"), "", "float32", "bfloat16", "int8"])
    | st.sampled_from(
        ["Quantized", "Counted", "dict", "object", "O", "S9", "V8", "datetime64[s]", "key<fry>", "complex64"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(node, path=()):
    """The paths to all values in a JSON."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


PLACES = [path for path in places(GOOD) if path and path != ("sha256",)]


@st.composite
def mutants(draw):
    content = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(PLACES))
        node = content
        try:
            for key in way:
                node = node[key]
            if draw(st.booleans()) or not isinstance(node, dict):
                node[last] = draw(VALUES)
            else:
                node.pop(last)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    if draw(st.integers(0, 9)):
        rest = {key: value for key, value in content.items() if key != "sha256"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return content


def check(content, allowed):
    try:
        expected = planned(Manifest.from_json(content), LIKE, TOLD, allowed).read
    except RefusedError:
        return
    if not allowed:
        assert expected == leaves_of(LIKE)
    # Whatever it says: no more is read than these parameters can have.
    for x in expected.values():
        assert np.prod(x.shape) <= 16 * 256


@settings(max_examples=1000)
@given(mutants(), st.sampled_from(ALLOWED))
def test_a_thousand_manifests(content, allowed):
    check(content, allowed)


@pytest.mark.slow
@settings(max_examples=100_000, derandomize=False, database=None)
@given(mutants(), st.sampled_from(ALLOWED))
def test_a_hundred_thousand_manifests(content, allowed):
    check(content, allowed)
