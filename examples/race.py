"""Six optimizers race down four surfaces, each with the learning rate that suits it best.

You will see the paths over the contours of Rosenbrock's banana, of Beale's function, of a narrow ravine

    f(x, y) = (a^2 + 100 b^2) / 2,   (a, b) = (x, y) rotated by 30 degrees,

and of a saddle with a minimum on either side, f(x, y) = x^2 / 2 + (y^2 - 1)^2 / 4. All four have the minimum 0.

The race is fair: every optimizer runs with every learning rate of one grid. Runs that ever climb above their start are
out; of the others the one with the lowest geometric mean of f over the steps is kept, which rewards speed from the
first step to the last. The same mean makes the ranking beside each surface.

What to learn: no optimizer wins everywhere. Dividing by sqrt(v) works coordinate by coordinate. It sets off at once
across the saddle's tiny slope in y, while SGD slides down to the saddle point first; but it cannot see a ravine that
runs across the axes. There momentum helps, with the division (Adam) or without, and RMSProp, which has none, is last.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture

import adamite

STEPS, FLOOR = 200, 1e-6  # below the floor all are equal
LEARNING_RATES = jnp.logspace(-4, 1, 61)
Maker = Callable[[jax.Array], optax.GradientTransformation]
OPTIMIZERS: dict[str, Maker] = {
    "SGD": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "Adagrad": optax.adagrad,
    "RMSProp": optax.rmsprop,
    "Adam": adamite.adam,
    "NAdam": adamite.nadam,
}
Surface = Callable[[jax.Array, jax.Array], jax.Array]


def rosenbrock(x: jax.Array, y: jax.Array) -> jax.Array:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: jax.Array, y: jax.Array) -> jax.Array:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def ravine(x: jax.Array, y: jax.Array) -> jax.Array:
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    return ((cos * x + sin * y) ** 2 + 100 * (cos * y - sin * x) ** 2) / 2


def saddle(x: jax.Array, y: jax.Array) -> jax.Array:
    return x**2 / 2 + (y**2 - 1) ** 2 / 4


# name, function (its minimum is 0), start, minima, window (x from, x to, y from, y to)
SURFACES: list[tuple[str, Surface, tuple[float, float], list[tuple[float, float]], tuple[float, ...]]] = [
    ("Rosenbrock", rosenbrock, (-1.2, 1.0), [(1, 1)], (-1.8, 1.8, -0.9, 2.1)),
    ("Beale", beale, (0.7, 1.4), [(3, 0.5)], (-1.1, 3.7, -2.1, 1.9)),
    ("ravine", ravine, (-1.5, 0.3), [(0, 0)], (-1.9, 1.1, -1.7, 0.8)),
    ("saddle", saddle, (-1.2, 1e-4), [(0, 1), (0, -1)], (-1.6, 1.76, -1.4, 1.4)),
]


def descend(surface: Surface, make: Maker, start: tuple[float, float], learning_rate: jax.Array) -> jax.Array:
    """The path: the start and the point after each step, shape (STEPS + 1, 2)."""
    tx = make(learning_rate)
    begin = jnp.asarray(start)

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple, Any]:
        point, state = carry
        updates, state = tx.update(jax.grad(lambda p: surface(*p))(point), state, point)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    _, path = jax.lax.scan(step, (begin, tx.init(begin)), length=STEPS)
    return jnp.concatenate([begin[None], path])


@partial(jax.jit, static_argnums=(0, 1, 2))
def best(surface: Surface, make: Maker, start: tuple[float, float]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best learning rate, its score (the geometric mean of f), and its path."""
    paths = jax.vmap(partial(descend, surface, make, start))(LEARNING_RATES)
    heights = surface(paths[..., 0], paths[..., 1])
    scores = 10 ** jnp.log10(heights + FLOOR).mean(axis=1)
    descends = (heights <= heights[:, :1]).all(axis=1)
    winner = jnp.argmin(jnp.where(descends, scores, jnp.inf))
    return LEARNING_RATES[winner], scores[winner], paths[winner]


def main(out: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.8))
    print(f"{'surface':12}{'optimizer':12}{'learning rate':>14}{'f at start':>12}{'mean of f':>12}{'f at end':>12}")
    for axes, (name, surface, start, minima, (left, right, bottom, top)) in zip(panels.flat, SURFACES, strict=True):
        x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
        height = np.log10(np.asarray(surface(jnp.asarray(x), jnp.asarray(y))) + 1e-3)
        axes.contourf(x, y, height, levels=12, colors=plt.get_cmap("Greys")(np.linspace(0.03, 0.45, 14)))
        results = {optimizer: best(surface, make, start) for optimizer, make in OPTIMIZERS.items()}
        for optimizer, (learning_rate, score, path) in results.items():
            begin, end = surface(*path[0]), surface(*path[-1])
            print(f"{name:12}{optimizer:12}{learning_rate:14.2g}{begin:12.2g}{score:12.1e}{end:12.1e}")
            axes.plot(*np.asarray(path).T, ".-", color=picture.COLORS[optimizer], linewidth=1.2, markersize=2.5)
        for row, optimizer in enumerate(sorted(results, key=lambda o: results[o][1])):
            text, style = f"{optimizer}\n{results[optimizer][1]:.2g}", {"color": picture.COLORS[optimizer]}
            axes.text(1.03, 0.98 - 0.16 * row, text, va="top", transform=axes.transAxes, **style)
        axes.plot(*np.transpose(minima), "*", color="white", markeredgecolor="black", markersize=11, zorder=5)
        axes.plot(*start, "o", color="white", markeredgecolor="black", markersize=6, zorder=5)
        axes.set(title=name, xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")
    title = f"{STEPS} steps from the circle towards the star. Beside each: geometric mean of f, best first"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    picture.save(figure, out / "race.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
