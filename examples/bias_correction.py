"""Why Adam corrects the bias of its moments.

m and v start at zero. After t steps they have seen a share 1 - b1^t and 1 - b2^t of what they average, so that without
the correction the update is

    (1 - b1^t) / sqrt(1 - b2^t)

times as large: 3.16 at the first step, 6.6 at the twelfth, and still 1.26 after 1,000 (b1 = 0.9, b2 = 0.999). You
will see that factor, measured and by the formula; and what it does to the training of a small network on scikit-learn's
digits: the loss over 200 steps, and at their end against the learning rate (lines: median of 8 seeds, bands: all).

What to learn: leaving the correction out is a warm-up turned upside down, the largest steps at the very start, where
the gradients are trusted least. With a small learning rate that is merely a larger one for a while, and helps; with a
large one it throws the network so far away that it never returns (2.3 nats is guessing). An Adam without correction,
such as BERT's, is used with a warm-up.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture
from sklearn.datasets import load_digits

import adamite

B1, B2, STEPS, SEEDS, WIDTH, SHOWN = 0.9, 0.999, 200, 8, 64, 0.03
LEARNING_RATES = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
RED, BLUE = picture.COLORS["Adam"], picture.COLORS["momentum"]
IMAGES, DIGITS = (jnp.asarray(x) for x in load_digits(return_X_y=True))


def loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(IMAGES[batch] / 16 @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, DIGITS[batch]).mean()


def train(corrected: bool, learning_rate: jax.Array, key: jax.Array) -> jax.Array:
    """The loss at every step, shape (STEPS,)."""
    tx = optax.chain(
        adamite.scale_by_adam(B1, B2, bias_correction=corrected),
        adamite.scale_by_learning_rate(learning_rate),
    )
    keys = jax.random.split(key, 3)
    init = jax.nn.initializers.he_normal()
    params = {
        "w1": init(keys[0], (64, WIDTH)),
        "b1": jnp.zeros(WIDTH),
        "w2": init(keys[1], (WIDTH, 10)),
        "b2": jnp.zeros(10),
    }

    def step(carry: tuple, batch: jax.Array) -> tuple[tuple, jax.Array]:
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    batches = jax.random.randint(keys[2], (STEPS, 64), 0, len(IMAGES))
    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


def ratio(steps: int) -> np.ndarray:
    """Uncorrected over corrected update, step by step, for the same noisy gradients."""
    gradients = 1 + jax.random.normal(jax.random.key(1), (steps,))

    def updates(corrected: bool) -> Any:
        tx = adamite.scale_by_adam(B1, B2, bias_correction=corrected)

        def step(state: optax.OptState, g: jax.Array) -> tuple[optax.OptState, optax.Updates]:
            u, state = tx.update(g, state)
            return state, u

        return jax.lax.scan(step, tx.init(jnp.zeros(())), gradients)[1]

    return np.asarray(updates(False) / updates(True))


def main(out: Path) -> None:
    t = np.arange(1, 3001)
    theory, measured = (1 - B1**t) / np.sqrt(1 - B2**t), ratio(3000)
    print(f"first update, uncorrected / corrected: {measured[0]:.3f} (theory {theory[0]:.3f})")
    print(f"largest ratio: {measured.max():.2f} at step {t[measured.argmax()]} (theory {theory.max():.2f})")

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.3))
    left.plot(t, theory, color=picture.GRAY, linewidth=5, alpha=0.4)
    left.plot(t, measured, color=BLUE)
    left.axhline(1, color=RED)
    left.set(xscale="log", xlabel="step t", title="update, uncorrected / corrected", ylim=(0, 7))
    picture.label(left, 1, measured[0], f"{measured[0]:.2f}", BLUE, dx=8, dy=-2)
    picture.label(left, 40, 6, "uncorrected", BLUE)
    picture.label(left, 40, 5.4, "(gray: the formula)", picture.GRAY)
    picture.label(left, 40, 1, "corrected", RED, dy=-8)

    ends = {}
    for corrected, color in ((True, RED), (False, BLUE)):
        over_seeds = jax.vmap(partial(train, corrected), (None, 0))
        runs = jax.jit(jax.vmap(over_seeds, (0, None)))(LEARNING_RATES, jax.random.split(jax.random.key(0), SEEDS))
        curves = np.asarray(runs)[LEARNING_RATES.tolist().index(SHOWN)]
        ends[corrected] = np.asarray(runs)[:, :, -20:].mean(axis=2)
        middle.plot(np.arange(STEPS), np.median(curves, axis=0), color=color)
        middle.fill_between(np.arange(STEPS), *np.quantile(curves, (0, 1), axis=0), color=color, alpha=0.2, linewidth=0)
        right.plot(LEARNING_RATES, np.median(ends[corrected], axis=1), ".-", color=color)
        right.fill_between(LEARNING_RATES, *np.quantile(ends[corrected], (0, 1), axis=1), color=color, alpha=0.2, lw=0)
    middle.set(yscale="log", xlabel="step", title=f"training loss (nats), learning rate {SHOWN}", ylim=(1e-2, 6))
    right.set(xscale="log", yscale="log", xlabel="learning rate", title=f"loss of steps {STEPS - 20} to {STEPS}")
    picture.label(middle, 70, 1.6, "uncorrected", BLUE)
    picture.label(middle, 5, 0.03, "corrected", RED)
    picture.label(right, LEARNING_RATES[0], 0.027, "uncorrected", BLUE, dx=0)
    picture.label(right, LEARNING_RATES[1], 0.28, "corrected", RED)
    for learning_rate, with_it, without in zip(
        LEARNING_RATES, *(np.median(e, axis=1) for e in ends.values()), strict=True
    ):
        print(
            f"learning rate {learning_rate:<6.3g} loss at the end: corrected {with_it:.3f}, uncorrected {without:.3f}"
        )
    picture.save(figure, out / "bias_correction.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
