"""Moving averages, bias correction and widths, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamite import numerics


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_update_moment(order, decay):
    g, m = np.array([1.5, -2.0, 0.0], np.float32), np.array([0.1, 0.2, 0.3], np.float32)
    ours = numerics.update_moment({"x": jnp.asarray(g)}, {"x": jnp.asarray(m)}, decay, order)
    np.testing.assert_allclose(ours["x"], (1 - decay) * g**order + decay * m, rtol=1e-6)


def test_update_moment_of_complex_numbers():
    g = jnp.array([3 + 4j, 1j])
    np.testing.assert_allclose(numerics.update_moment(g, jnp.zeros(2), 0.5, 2), [12.5, 0.5])
    np.testing.assert_allclose(numerics.update_moment(g, 0 * g, 0.5, 1), [1.5 + 2j, 0.5j])


def test_update_moment_of_nothing():
    assert numerics.update_moment({"x": None}, {"x": jnp.ones(2)}, 0.5, 1) == {"x": None}


@pytest.mark.parametrize("count", [1, 2, 10, 10_000, 2**31 - 1])
def test_bias_correction(count):
    expected = 0.5 / (1 - 0.999 ** float(count))
    np.testing.assert_allclose(numerics.bias_correction(jnp.float32(0.5), 0.999, jnp.int32(count)), expected, rtol=5e-5)


def test_bias_correction_keeps_the_dtype():
    assert numerics.bias_correction(jnp.ones(2, jnp.bfloat16), jnp.float32(0.9), jnp.int32(1)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("complex64", "complex64")],
)
def test_widen(narrow, wide):
    assert numerics.widen(jnp.ones(2, narrow)).dtype == wide


def test_python_numbers_do_not_follow_the_default_dtype():
    with jax.enable_x64(True):
        assert [numerics.widen(x).dtype for x in (1, 1.0, 1j)] == [jnp.float32, jnp.float32, jnp.complex64]
        assert numerics.widen(np.ones(2)).dtype == jnp.float64


def test_as_array_and_cast_leave_what_fits():
    x = jnp.ones(3)
    assert numerics.as_array(x) is x
    assert numerics.cast(x, jnp.float32) is x
