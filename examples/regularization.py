"""Three ways to make weights small, and what each does inside Adam.

Linear regression on scikit-learn's diabetes data (442 patients, 10 features, everything standardized), for 25
strengths s at once. You will see the weights against s:

    L2 in the loss      |X w - y|^2 / 2n + s |w|^2 / 2      lines: Adam; dots: ridge, (X'X/n + s I)^-1 X'y/n
    L1 in the loss      |X w - y|^2 / 2n + s sum |w_i|      lines: Adam (subgradient); dots: scikit-learn's Lasso
    decoupled decay     adamw(weight_decay=s)               lines: AdamW; dots: ridge with s sqrt(v_i) in place of s

What to learn: where a sum of loss and penalty is the goal, Adam reaches its minimum like any other optimizer; dividing
by sqrt(v) changes the way there, not the end. Decoupled decay is not such a sum. Each step shrinks every weight by the
same fraction, learning_rate * s, and Adam's step is the gradient over sqrt(v): the two balance where

    gradient_i + s sqrt(v_i) w_i = 0,

so that its strength is relative to the noise of the gradient, feature by feature, and needs no new tuning when the loss
changes its unit. (v_i is that of the last steps; gradients are of mini-batches of 32.)
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from sklearn.preprocessing import scale

import adamite

X, Y = map(scale, load_diabetes(return_X_y=True))
STRENGTHS = np.logspace(-3, 1, 25)
STEPS = 10_000
SCHEDULE = optax.cosine_decay_schedule(0.03, STEPS)
FEATURES = {
    "age": "#b0b0b0",
    "sex": "#CC79A7",
    "BMI": "#D55E00",
    "blood pressure": "#E69F00",
    "total cholesterol": "#0072B2",
    "LDL": "#56B4E9",
    "HDL": "#909090",
    "cholesterol / HDL": "#404040",
    "log triglycerides": "#009E73",
    "glucose": "#b0b0b0",
}
Rows = jax.Array | slice


def loss(w: jax.Array, rows: Rows) -> jax.Array:
    return jnp.mean((jnp.asarray(X)[rows] @ w - jnp.asarray(Y)[rows]) ** 2) / 2


def minimize(
    objective: Callable[[jax.Array, Rows], jax.Array], tx: optax.GradientTransformation, batch: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The weights after STEPS steps from zero, and v; mini-batches of `batch` rows, or of all."""
    w = jnp.zeros(X.shape[1])

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        w, state = carry
        rows = jax.random.choice(key, len(X), (batch,)) if batch else slice(None)
        updates, state = tx.update(jax.grad(objective)(w, rows), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), jax.random.split(jax.random.key(0), STEPS))
    return w, optax.tree.get(state, "nu")


def l2(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return minimize(lambda w, rows: loss(w, rows) + strength * jnp.sum(w**2) / 2, adamite.adam(SCHEDULE))


def l1(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return minimize(lambda w, rows: loss(w, rows) + strength * jnp.sum(jnp.abs(w)), adamite.adam(SCHEDULE))


def decoupled(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return minimize(loss, adamite.adamw(SCHEDULE, weight_decay=strength), batch=32)


def ridge(strengths: np.ndarray) -> np.ndarray:
    """The exact minimum of the loss plus sum_i strengths_i w_i^2 / 2."""
    return np.linalg.solve(X.T @ X / len(X) + np.diag(strengths), X.T @ Y / len(X))


def lasso(strength: float) -> np.ndarray:
    return Lasso(alpha=strength, fit_intercept=False, tol=1e-8, max_iter=10**6).fit(X, Y).coef_


def main(out: Path) -> None:
    by_l2, by_l1, by_decay = (jax.jit(jax.vmap(method))(STRENGTHS) for method in (l2, l1, decoupled))
    columns = [
        ("L2 in the loss", "ridge", by_l2[0], [ridge(np.full(X.shape[1], s)) for s in STRENGTHS]),
        ("L1 in the loss", "Lasso", by_l1[0], [lasso(s) for s in STRENGTHS]),
        (
            "decoupled decay",
            "ridge with s sqrt(v)",
            by_decay[0],
            list(map(ridge, STRENGTHS[:, None] * by_decay[1] ** 0.5)),
        ),
    ]
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), sharey=True, width_ratios=(1.4, 1, 1))
    for axes, (title, reference, weights, exact) in zip(panels, columns, strict=True):
        print(f"{title}: largest difference from {reference}: {np.abs(weights - np.array(exact)).max():.1e}")
        for feature, color in enumerate(FEATURES.values()):
            axes.plot(STRENGTHS, weights[:, feature], color=color)
            axes.plot(STRENGTHS, np.array(exact)[:, feature], ".", color=color, markersize=5)
        axes.set(title=f"{title}\ndots: {reference}", xlabel="strength s", xscale="log")
    for (name, color), weight in zip(FEATURES.items(), by_l2[0][0], strict=True):
        picture.label(panels[0], STRENGTHS[0], weight, name, color, dx=-5, dy={"HDL": 4, "glucose": -4}.get(name, 0))
    panels[0].set(
        ylabel="weight (in standard deviations)", xlim=(STRENGTHS[0] / 90, None), xticks=10.0 ** np.arange(-3, 2)
    )
    panels[0].minorticks_off()
    picture.save(figure, out / "regularization.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
