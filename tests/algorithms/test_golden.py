"""Golden trajectories: every optimizer, over its grid of hyperparameters, against its paper in float64 NumPy.

1,000 steps each, with a constant and a decaying learning rate. One program per optimizer and set of flags runs its
whole grid at once: the hyperparameters are traced and mapped over.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from naming import named
from specs import SPECS, Spec, halved

pytestmark = pytest.mark.few(6)

STEPS, SIZE = 1000, 24
RNG = np.random.default_rng(0)
THETA = RNG.standard_normal(SIZE).astype(np.float32).astype(np.float64)  # exact in float32, too
# Gradients whose size differs by element over eight decades and drifts in time, as a network's do.
SIZES = 10.0 ** RNG.uniform(-6, 2, SIZE) * (1 + 0.9 * np.sin(np.arange(STEPS) / 50))[:, None]
GRADIENTS = (SIZES * (RNG.standard_normal((STEPS, SIZE)) + 0.3)).astype(np.float32).astype(np.float64)

SCHEDULES = {
    "constant": lambda rate: rate,
    "decaying": lambda rate: lambda count: rate / (1 + 0.01 * count),
}
GOLDEN = [s for s in SPECS if s.paper]
CASES = [
    pytest.param(spec, flags, schedule, id=f"{spec}-{named(flags)}-{schedule}")
    for spec in GOLDEN
    for flags in spec.flags
    for schedule in SCHEDULES
]


def ours(spec: Spec, flags, schedule, dtype):
    """The paths of all points of the grid, shape (points, STEPS, SIZE)."""

    def run(values):
        tx = spec.make(SCHEDULES[schedule](spec.rate), **values, **flags)

        def step(carry, g):
            theta, state = carry
            updates, state = tx.update(g, state, theta)
            theta = optax.apply_updates(theta, updates)
            return (theta, state), theta

        theta = jnp.asarray(THETA, dtype)
        return jax.lax.scan(step, (theta, tx.init(theta)), jnp.asarray(GRADIENTS, dtype))[1]

    points = spec.combinations()
    values = {name: jnp.asarray([point[name] for point in points], dtype) for name in spec.grid}
    return np.asarray(jax.jit(jax.vmap(run, axis_size=len(points)))(values), np.float64)


@functools.cache
def paper(name: str, index: int, schedule: str):
    spec = next(s for s in GOLDEN if s.name == name)
    flags = spec.flags[index]
    return np.stack(
        [spec.paper(THETA, GRADIENTS, SCHEDULES[schedule](spec.rate), **p, **flags) for p in spec.combinations()]
    )


def error(path, expected):
    """Distance from the paper's path over the distance that it has moved, Euclidean; the worst of all steps."""
    off, moved = np.linalg.norm(path - expected, axis=-1), np.linalg.norm(expected - THETA, axis=-1)
    return np.divide(off, moved, out=np.where(off > 0, np.inf, 0.0), where=moved > 0).max(axis=-1)


@pytest.mark.parametrize(("spec", "flags", "schedule"), halved(CASES))
def test_float64_is_the_paper(spec, flags, schedule):
    expected = paper(spec.name, spec.flags.index(flags), schedule)
    with jax.enable_x64(True):
        path = ours(spec, flags, schedule, jnp.float64)
    np.testing.assert_array_less(error(path, expected), 1e-12)


@pytest.mark.parametrize(("spec", "flags", "schedule"), CASES[:: len(SCHEDULES)])
def test_float32_stays_close_to_the_paper(spec, flags, schedule):
    """Within 2e-6 of the displacement, or 2e-5 where we keep optax's bits, most of it its rounding of 1 - b^t.

    From the tenth step on: half a unit in the last place of the weights can be more of the first steps.
    """
    expected = paper(spec.name, spec.flags.index(flags), schedule)
    path = ours(spec, flags, schedule, jnp.float32)
    np.testing.assert_array_less(error(path[:, 9:], expected[:, 9:]), spec.close)


def test_there_are_over_a_thousand():
    assert sum(len(spec.combinations()) * len(spec.flags) * len(SCHEDULES) for spec in GOLDEN) >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("spec", GOLDEN, ids=str)
def test_a_wrong_hyperparameter_is_seen(spec):
    """Each hyperparameter matters to some trajectory: nothing is ignored."""
    with jax.enable_x64(True):
        expected = ours(spec, spec.flags[0], "constant", jnp.float64)[0]
        for name, (default, *others) in spec.grid.items():
            moved = spec._replace(grid={**{n: v[:1] for n, v in spec.grid.items()}, name: (default, others[0])})
            path = ours(moved, spec.flags[0], "constant", jnp.float64)[1]
            assert error(path, expected) > 1e-9, name
