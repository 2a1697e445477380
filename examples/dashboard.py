"""A training run under watch: what `with_telemetry` tells, while bad batches come and guards leave them out.

A network learns scikit-learn's digits. Two of its 600 batches are broken: at step 200 a pixel is NaN, at step 400 the
images are a thousand times too bright. You will see the loss (both steps are missing from it), norms, how far each
layer moves relative to its size, the share of weights whose step epsilon decides, and the count of steps left out; all
of it from one flat dict a step, which the program also writes as a CSV file.

What to learn: telemetry goes around the guards, the guards around the optimizer, and the loop stays as it was.
"""

import csv
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

STEPS, BATCH, WIDTH, NAN_AT, BRIGHT_AT = 600, 128, 64, 200, 400
LAYERS = {"w1": "first layer", "w2": "second layer", "w3": "third layer"}

schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, STEPS)
tx = adamite.with_telemetry(adamite.skip_spikes(adamite.adamw(schedule), window=64))


def init(key: jax.Array) -> dict[str, jax.Array]:
    keys, he = jax.random.split(key, 3), jax.nn.initializers.he_normal()
    return {
        "w1": he(keys[0], (64, WIDTH)),
        "w2": he(keys[1], (WIDTH, WIDTH)),
        "w3": he(keys[2], (WIDTH, 10)),
        "b": jnp.zeros(10),
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(jax.nn.relu(x @ params["w1"]) @ params["w2"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["w3"] + params["b"], y).mean()


@jax.jit
def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def batch(number: int, images: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step; two of them are broken."""
    chosen = np.random.default_rng(number).integers(len(images), size=BATCH)
    x = (images[chosen] / 16).astype(np.float32)
    if number == NAN_AT:
        x[17, 20] = np.nan
    return x * (1000 if number == BRIGHT_AT else 1), digits[chosen]


def draw(log: dict[str, np.ndarray], path: Path) -> None:
    """Six panels over the same steps."""
    figure, panels = plt.subplots(2, 3, figsize=(9.6, 4.6), sharex=True)
    loss, norms, ratios, epsilon, rate, skipped = panels.flat
    colors = [picture.COLORS[name] for name in ("Adam", "momentum", "Adagrad")]
    usual = np.where(np.isin(np.arange(STEPS), (NAN_AT, BRIGHT_AT)), np.nan, log["loss"])
    loss.plot(usual, color=colors[0])
    loss.set(yscale="log", title="loss (nats)")
    for name, color in (("gradient_norm", colors[1]), ("sqrt_nu_norm", colors[2])):
        norms.plot(log[name], color=color, linewidth=1)
    norms.set(yscale="log", title="norm of the gradient, of sqrt(nu)")
    picture.label(norms, STEPS, log["gradient_norm"][-1], "g", colors[1], dy=-8)
    picture.label(norms, STEPS, log["sqrt_nu_norm"][-1], "sqrt(nu)", colors[2], dy=6)
    for (name, title), color in zip(LAYERS.items(), colors, strict=True):
        ratio = log[f"update_ratio/{name}"]
        ratios.plot(np.where(ratio > 0, ratio, np.nan), color=color, linewidth=1, label=title)
    ratios.set(yscale="log", ylim=(1e-6, 1e-1), title="update / weight")
    ratios.legend(frameon=False, fontsize=7, loc="lower left")
    epsilon.plot(100 * log["epsilon_share/w1"], color=colors[0])
    epsilon.set(title="first layer: epsilon decides (%)", ylim=(0, 25), xlabel="step")
    rate.plot(log["learning_rate"], color=colors[1])
    rate.set(title="learning rate", xlabel="step")
    skipped.plot(log["skipped"], color=colors[0], drawstyle="steps-post")
    skipped.set(title="steps left out", yticks=(0, 1, 2), xlabel="step")
    for step, text in ((NAN_AT, "a NaN"), (BRIGHT_AT, "too bright")):
        skipped.annotate(
            text, (step, log["skipped"][step]), (-4, -2), textcoords="offset points", ha="right", fontsize=8
        )
    picture.save(figure, path)


def main(out: Path) -> None:
    images, digits = load_digits(return_X_y=True)
    params = init(jax.random.key(0))
    state, rows = tx.init(params), []
    for number in range(STEPS):
        params, state, loss = train_step(params, state, *batch(number, images, digits))
        rows.append({"loss": float(loss), **adamite.telemetry(state)})
    out.mkdir(parents=True, exist_ok=True)
    with (out / "dashboard.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    log = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    print(f"numbers a step: {len(rows[0])}, in {out / 'dashboard.csv'}")
    print(f"loss: first step {log['loss'][0]:.3f}, last fifty {log['loss'][-50:].mean():.4f}")
    told = int(log["skipped"][NAN_AT - 1]), int(log["skipped"][NAN_AT]), int(log["skipped"][BRIGHT_AT])
    print(f"left out before step {NAN_AT}: {told[0]}, with it: {told[1]}, with step {BRIGHT_AT}: {told[2]}")
    print(f"gradient norm at step {BRIGHT_AT}: {log['gradient_norm'][BRIGHT_AT]:.1f}")
    draw(log, out / "dashboard.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
