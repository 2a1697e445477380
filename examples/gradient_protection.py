"""Differentiating through training: the derivative of the loss after 20 Adam steps by the learning rate.

You will see the loss of a linear classifier of scikit-learn's digits after 20 steps, against the learning rate, and in
some points the tangent whose slope JAX computed by differentiating through all the steps. What to learn:

- Some pixels are dark in every image. Their gradient is 0, so v = 0, where the derivative of sqrt(v) is infinite, and
  infinity times 0 is NaN: one dark pixel spoils the derivative of everything. `eps_root` > 0 moves the root away from
  0: u = m_hat / (sqrt(v_hat + eps_root) + eps). Set it when you differentiate through an optimizer, and only then.
- The learning rate acts in two ways: every step is longer, and every later gradient is taken elsewhere.
  `jax.lax.stop_gradient` on the gradients cuts the second way. What is left is cheaper (no second derivatives), and
  wrong: compare the dashed tangents.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture
from sklearn.datasets import load_digits

import adamite

STEPS, EPS_ROOT = 20, 1e-12
IMAGES, DIGITS = (jnp.asarray(x) for x in load_digits(return_X_y=True))


def loss(weights: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(IMAGES / 16 @ weights, DIGITS).mean()


def after_training(learning_rate: jax.Array, eps_root: float = EPS_ROOT, *, stop: bool = False) -> jax.Array:
    """The loss after STEPS Adam steps from zero."""
    tx = adamite.adam(learning_rate, eps_root=eps_root)
    weights = jnp.zeros((64, 10))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        weights, state = carry
        gradient = jax.grad(loss)(weights)
        if stop:
            gradient = jax.lax.stop_gradient(gradient)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), length=STEPS)
    return loss(weights)


def slopes(learning_rates: np.ndarray, **options: float) -> tuple[np.ndarray, np.ndarray]:
    """The loss after training, and its derivative by the natural logarithm of the learning rate."""
    losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(partial(after_training, **options))))(learning_rates)
    return np.asarray(losses), np.asarray(gradients * learning_rates)


def main(out: Path) -> None:
    learning_rates = np.logspace(-2.5, 0.5, 49)
    losses, full = slopes(learning_rates)
    _, unprotected = slopes(learning_rates, eps_root=0.0)
    _, stopped = slopes(learning_rates, stop=True)
    measured = np.gradient(losses, np.log(learning_rates))
    print(f"pixels that are dark in every image: {int((IMAGES == 0).all(axis=0).sum())}")
    print(f"eps_root = 0: {np.isfinite(unprotected).sum()} of {len(unprotected)} meta-gradients are finite")
    print(f"eps_root = {EPS_ROOT}: {np.isfinite(full).sum()} of {len(full)} meta-gradients are finite")
    inner = slice(1, -1)  # central differences
    print(f"difference from finite differences: {np.abs(full - measured)[inner].max():.3f}")
    print(f"difference with stop_gradient: {np.abs(stopped - measured)[inner].max():.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    red, blue = picture.COLORS["Adam"], picture.COLORS["momentum"]
    left.plot(learning_rates, losses, color="#b0b0b0", linewidth=3)
    for i in range(4, 49, 8):
        around = learning_rates[i] * np.exp([-0.5, 0.5])
        left.plot(around, losses[i] + stopped[i] * np.array([-0.5, 0.5]), "--", color=blue)
        left.plot(around, losses[i] + full[i] * np.array([-0.5, 0.5]), color=red)
        left.plot(learning_rates[i], losses[i], "o", color=red, markersize=4)
    left.set(xscale="log", xlabel="learning rate", title=f"loss after {STEPS} steps (nats), and tangents")
    right.plot(learning_rates[inner], measured[inner], ".", color="#b0b0b0", markersize=8)
    right.plot(learning_rates, stopped, "--", color=blue)
    right.plot(learning_rates, full, color=red)
    right.set(xscale="log", xlabel="learning rate", title="slope: nats per e-fold of the learning rate")
    picture.label(right, 0.06, -0.45, "with stop_gradient", blue)
    picture.label(right, 0.02, 0.12, "through all steps", red)
    picture.label(right, 0.02, 0.24, "finite differences", picture.GRAY)
    picture.save(figure, out / "gradient_protection.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
