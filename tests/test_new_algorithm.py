"""A new algorithm costs one file and one spec: the toy of `toy.py` passes what every member passes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import test_contract
import toy
from algorithms.test_golden import GRADIENTS, THETA, error, ours
from specs import Spec


def paper(theta, gradients, learning_rate, b1=0.9):
    m, path = np.zeros_like(theta), []
    for t, g in enumerate(gradients):
        m = b1 * m + (1 - b1) * g
        theta = theta - (learning_rate(t) if callable(learning_rate) else learning_rate) * np.sign(m)
        path.append(theta)
    return np.stack(path)


SPEC = Spec("signum", toy.signum, None, paper, {"b1": (0.9, 0.5)})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_golden(dtype):
    expected = np.stack([paper(THETA, GRADIENTS, 1e-2, **point) for point in SPEC.combinations()])
    with jax.enable_x64(dtype == "float64"):
        path = ours(SPEC, {}, "constant", jnp.dtype(dtype))
    np.testing.assert_array_less(error(path, expected), 1e-12 if dtype == "float64" else 2e-5)


CONTRACT = [
    getattr(group(), name)
    for group in (test_contract.TestDropIn, test_contract.TestTypes, test_contract.TestCompilation)
    for name, test in vars(group).items()
    if name.startswith("test_")
    and [m.args[0] for m in getattr(test, "pytestmark", [])] == ["spec"]
    and test.pytestmark[0].args[1] is test_contract.each.args[1]
]


@pytest.mark.parametrize("test", CONTRACT, ids=lambda t: t.__name__)
def test_contract_holds(test):
    test(SPEC)


def test_there_is_a_contract_to_hold():
    assert len(CONTRACT) >= 10


def test_it_costs_no_more_than_sixty_lines():
    assert len(pathlib.Path(toy.__file__).read_text().splitlines()) <= 60
