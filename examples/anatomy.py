"""One coordinate of Adam, taken apart: what m, v and the update do while a real, noisy gradient streams in.

The gradient is that of one weight of a logistic regression (scikit-learn's breast cancer data, mini-batches of 8). To
make it jump, the loss is multiplied by 10 from step 400 to step 1,000. At every step

    m <- b1 m + (1 - b1) g          m_hat = m / (1 - b1^t)
    v <- b2 v + (1 - b2) g^2        v_hat = v / (1 - b2^t)          u = m_hat / (sqrt(v_hat) + eps)

You will see the first 40 steps on the left, the whole stream on the right. What to learn:

- m and v start at 0, and far too low; m_hat and v_hat have the right size from the first step on.
- u has no unit and lies near [-1, 1], whatever the gradient's size: mostly mean over noise.
- m remembers 1 / (1 - b1) = 10 steps, v 1,000. When the gradient grows tenfold, m follows at once and v does not, so u
  overshoots; when it shrinks again, v stays large and Adam crawls for thousands of steps.
- How far it can overshoot: |u| < (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 7.27 at the defaults (Cauchy-Schwarz).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale

import adamite

B1, B2, EPS = 0.9, 0.999, 1e-8
STEPS, JUMP, FALL, FEATURE = 2_000, 400, 1_000, 4


def gradient_stream() -> jax.Array:
    """The gradient of one weight at the start of training, mini-batch after mini-batch; shape (STEPS,)."""
    raw, labels = load_breast_cancer(return_X_y=True)
    inputs, labels = jnp.asarray(scale(raw)), jnp.asarray(labels)

    def loss(weights: jax.Array, batch: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(inputs[batch] @ weights, labels[batch]).mean()

    batches = jax.random.randint(jax.random.key(0), (STEPS, 8), 0, len(inputs))
    gradients = jax.vmap(jax.grad(loss), (None, 0))(jnp.zeros(inputs.shape[1]), batches)[:, FEATURE]
    t = jnp.arange(1, STEPS + 1)
    return gradients * jnp.where((t >= JUMP) & (t < FALL), 10, 1)


def anatomy(gradients: jax.Array) -> dict[str, np.ndarray]:
    """Every part of Adam's step at every step, by name."""

    def step(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array]) -> tuple:
        (m, v), (g, t) = carry, xs
        m, v = adamite.update_moment(g, m, B1, order=1), adamite.update_moment(g, v, B2, order=2)
        m_hat, v_hat = adamite.bias_correction(m, B1, t), adamite.bias_correction(v, B2, t)
        u = m_hat / (jnp.sqrt(v_hat) + EPS)
        return (m, v), {"g": g, "m": m, "v": v, "m_hat": m_hat, "v_hat": v_hat, "u": u}

    zero = jnp.zeros(())
    _, parts = jax.lax.scan(step, (zero, zero), (gradients, jnp.arange(1, STEPS + 1)))
    return {name: np.asarray(part) for name, part in parts.items()}


def library(gradients: jax.Array) -> Any:
    """The same updates, by adamite.scale_by_adam."""
    tx = adamite.scale_by_adam(B1, B2, EPS)

    def step(state: optax.OptState, g: jax.Array) -> tuple[optax.OptState, optax.Updates]:
        u, state = tx.update(g, state)
        return state, u

    return jax.lax.scan(step, tx.init(jnp.zeros(())), gradients)[1]


def main(out: Path) -> None:
    gradients = gradient_stream()
    parts = anatomy(gradients)
    u = parts["u"]
    bound = (1 - B1) / np.sqrt((1 - B2) * (1 - B1**2 / B2))
    calm, jump, fall = np.abs(u[JUMP - 100 : JUMP - 1]), np.abs(u[JUMP - 1 : FALL - 1]), np.abs(u[FALL + 49 :])
    print(f"largest difference from adamite.scale_by_adam: {np.abs(u - library(gradients)).max():.1e}")
    print(f"mean |u| before the jump: {calm.mean():.2f}")
    print(f"largest |u| after the jump: {jump.max():.2f}, at step {JUMP + jump.argmax()} (never above {bound:.2f})")
    print(f"mean |u| after the fall: {fall.mean():.2f}")

    figure, panels = plt.subplots(3, 2, figsize=(9, 6.6), width_ratios=(1, 1.9), sharex="col")
    t, red, blue = np.arange(1, STEPS + 1), picture.COLORS["Adam"], picture.COLORS["momentum"]
    rows = {
        "gradient g (nats)": {"g": parts["g"], "$m$": parts["m"], r"$\hat m$": parts["m_hat"]},
        "its size |g| (nats)": {
            "|g|": abs(parts["g"]),
            r"$\sqrt{v}$": np.sqrt(parts["v"]),
            r"$\sqrt{\hat v}$": np.sqrt(parts["v_hat"]),
        },
    }
    for (first, whole), (unit, lines), below in zip(panels, rows.items(), (-9, 9), strict=False):
        for (name, line), color, style, dy in zip(
            lines.items(), ("#b0b0b0", blue, red), ".--", (0, below, 10), strict=True
        ):
            first.plot(t[:40], line[:40], style, color=color)
            whole.plot(t, line, style, color=color, markersize=2)
            if style == "-":
                picture.label(first, 9, line[8], name, color, dx=0, dy=dy)
        first.set_ylabel(unit)
    for column, steps in enumerate((slice(0, 40), slice(0, STEPS))):
        panels[2, column].axhline(0, color=picture.GRAY, linewidth=0.8)
        panels[2, column].plot(t[steps], u[steps], color=red, linewidth=1.5 - 0.5 * column)
        panels[2, column].set(xlabel="step t", xlim=(0, t[steps][-1] + 1))
    for axes in panels[:, 1]:
        axes.axvspan(JUMP, FALL, color="#f0f0f0", zorder=0)
    panels[0, 0].set_title("the first 40 steps")
    panels[0, 1].set_title("all steps; in the gray span gradients are 10 times larger")
    panels[2, 0].set_ylabel("update u (no unit)")
    picture.label(panels[2, 1], 440, jump.max(), "m follows at once, v lags: u overshoots", red)
    picture.label(panels[2, 1], 1_100, 0, "v remembers: u stays small", red, dy=14)
    picture.save(figure, out / "anatomy.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
