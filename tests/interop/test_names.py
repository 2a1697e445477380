"""Names and axes elsewhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adamite.interop import flax_names
from adamite.interop.names import places

PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
WHOLE = {"dense.kernel": ("w", (1, 0)), "dense.bias": "b"}


def test_axes_go_both_ways():
    x = np.arange(24).reshape(2, 3, 4)
    [place] = places([x], {"0": ("x", (2, 0, 1))})
    assert place.shape == (3, 4, 2)
    assert place.theirs(x).flags.c_contiguous
    np.testing.assert_array_equal(place.ours(place.theirs(x)), x)
    assert place.ours(place.theirs(x))[1, 2, 3] == place.theirs(x)[2, 3, 1]


def test_the_order_is_the_mappings():
    assert [place.path for place in places(PARAMS, WHOLE)] == ["dense.kernel", "dense.bias"]
    assert [place.path for place in places(PARAMS, None)] == ["dense.bias", "dense.kernel"]


class TestFlax:
    def test_nnx(self):
        class Net(nnx.Module):
            def __init__(self):
                self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
                self.conv = nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0))
                self.norm = nnx.LayerNorm(5, rngs=nnx.Rngs(0))
                self.out = nnx.Linear(5, 2, rngs=nnx.Rngs(0))

        expected = {
            "conv.bias": "conv.bias",
            "conv.kernel": ("conv.weight", (2, 3, 1, 0)),
            "embed.embedding": "embed.weight",
            "norm.bias": "norm.bias",
            "norm.scale": "norm.weight",
            "out.bias": "out.bias",
            "out.kernel": ("out.weight", (1, 0)),
        }
        state = nnx.state(Net(), nnx.Param)
        assert flax_names(nnx.to_pure_dict(state)) == expected
        assert flax_names(state) == expected

    def test_linen(self):
        params = linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
        assert flax_names(params) == {"bias": "bias", "kernel": ("weight", (1, 0))}

    def test_other_names_and_ranks_stay(self):
        shapes = {"kernel": (2,), "embedding": (3, 2), "memory": (4, 4)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        assert flax_names(params) == {"embedding": "weight", "kernel": "kernel", "memory": "memory"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"dense.kernel": "w"}, "mapping must have an entry for each array of params, got none for 'dense.bias'"),
        (WHOLE | {"dense.scale": "s"}, "mapping has an entry 'dense.scale', but params has no such array"),
        (WHOLE | {"dense.bias": "w"}, "mapping gives 'dense.kernel' and 'dense.bias' one name, 'w'"),
        (
            WHOLE | {"dense.kernel": ("w", (0, 0))},
            "mapping['dense.kernel'] must have axes that are a permutation of (0, 1)",
        ),
        (WHOLE | {"dense.kernel": ("w", (1,))}, "permutation of (0, 1), got (1,)"),
        (WHOLE | {"dense.kernel": ("w", (0, 2))}, "permutation of (0, 1), got (0, 2)"),
        (WHOLE | {"dense.kernel": ("w", (1, "0"))}, "permutation of (0, 1), got (1, '0')"),
        (WHOLE | {"dense.kernel": ("w", 1)}, "permutation of (0, 1), got 1"),
    ],
)
def test_mappings_that_do_not_fit(mapping, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        places(PARAMS, mapping)


@pytest.mark.parametrize(
    ("params", "mapping", "message"),
    [
        (PARAMS, [("dense.kernel", "w")], "mapping must be None or a dict"),
        (PARAMS, WHOLE | {"dense.bias": None}, "mapping['dense.bias'] must be a name, a number or a pair"),
        (PARAMS, WHOLE | {"dense.bias": True}, "mapping['dense.bias'] must be a name, a number or a pair"),
        (PARAMS, WHOLE | {"dense.bias": 1.0}, "mapping['dense.bias'] must be a name, a number or a pair"),
        ({"w": "no array"}, None, "params['w'] must have a shape and a dtype"),
    ],
)
def test_wrong_kinds(params, mapping, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        places(params, mapping)


def test_two_arrays_of_one_name():
    with pytest.raises(ValueError, match=re.escape("one array of each name, got two called 'a.b'")):
        places({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, None)
