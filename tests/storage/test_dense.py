"""The invariants that every storage states, for the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamite.storage import Dense

LEAF = jax.ShapeDtypeStruct((3, 2), jnp.float32)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("param", ["float32", "bfloat16", "float16"])
def test_invariants(dtype, unsigned, param):
    storage = Dense(dtype and jnp.dtype(dtype), unsigned)
    stored = storage.fresh(jnp.ones((3, 2), param))
    assert stored.shape == (3, 2)
    assert (storage.decode(stored) == 0).all()
    assert storage.decode(stored).dtype == jnp.float32
    x = jnp.linspace(0.0, 7.0, 6).reshape(3, 2)
    encoded = storage.encode(x, stored, None)
    assert (encoded.shape, encoded.dtype) == (stored.shape, stored.dtype)
    assert stored.dtype == (dtype or "float32")
    np.testing.assert_allclose(storage.decode(encoded), x, rtol=2**-8 if dtype else 0)


def test_rounds_to_nearest_even():
    storage = Dense(jnp.dtype(jnp.bfloat16))
    stored = storage.fresh(LEAF)
    x = jnp.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    np.testing.assert_array_equal(storage.encode(x, stored, None).astype(jnp.float32), [1.0, 1 + 2**-6, 1 + 2**-7])


@pytest.mark.parametrize(("param", "real"), [("complex64", "float32"), ("float32", "float32")])
def test_squares_are_real(param, real):
    assert Dense(unsigned=True).fresh(jnp.ones(2, param)).dtype == real


def test_complex_dtypes_have_the_asked_parts():
    leaf = jnp.ones(2, jnp.complex64)
    assert Dense().fresh(leaf).dtype == jnp.complex64
    assert Dense(jnp.dtype("float32")).fresh(leaf).dtype == jnp.complex64
    with jax.enable_x64(True):
        assert Dense(jnp.dtype("float64")).fresh(leaf).dtype == jnp.complex128
