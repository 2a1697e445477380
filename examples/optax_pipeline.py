"""A training pipeline of Optax parts with Adam in the middle.

    optax.MultiSteps                 four mini-batches make one step
      optax.chain
        optax.snapshot               keep the gradient's norm, to draw it
        optax.clip_by_global_norm    at most 0.5
        optax.snapshot               and again
        optax.partition              two groups of parameters:
          adamite.adamw              the hidden layer; warm-up and cosine decay, no weight decay on biases
          optax.sgd                  the output layer

You will see the learning rate, the gradient's norm before and after clipping, and the loss of a small network on
scikit-learn's digits. What to learn: `adamite.adamw` stands wherever `optax.adamw` could. Its schedule counts updates,
not mini-batches; and every state inside is found by name, with `optax.tree.get(state, ...)`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import picture
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamite

MINI_BATCHES, BATCH, EVERY, WIDTH, MAX_NORM = 1_200, 32, 4, 64, 0.5
Params = dict[str, dict[str, jax.Array]]

schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=30, decay_steps=MINI_BATCHES // EVERY)
hidden = adamite.adamw(schedule, weight_decay=1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
output = optax.sgd(0.1, momentum=0.9)
tx = optax.MultiSteps(
    optax.chain(
        optax.snapshot("norm_before", optax.tree.norm),
        optax.clip_by_global_norm(MAX_NORM),
        optax.snapshot("norm_after", optax.tree.norm),
        optax.partition({"adam": hidden, "sgd": output}, {"hidden": "adam", "output": "sgd"}),
    ),
    every_k_schedule=EVERY,
)


def init(key: jax.Array) -> Params:
    keys, he = jax.random.split(key), jax.nn.initializers.he_normal()
    return {
        "hidden": {"w": he(keys[0], (64, WIDTH)), "b": jnp.zeros(WIDTH)},
        "output": {"w": he(keys[1], (WIDTH, 10)), "b": jnp.zeros(10)},
    }


def model(params: Params, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return h @ params["output"]["w"] + params["output"]["b"]


@jax.jit
def train_step(
    params: Params, state: optax.MultiStepsState, x: jax.Array, y: jax.Array
) -> tuple[optax.Params, optax.MultiStepsState, jax.Array]:
    def loss_fn(params: Params) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def main(out: Path) -> None:
    images, digits = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(np.float32(images / 16), digits, test_size=0.3, random_state=0)
    params = init(jax.random.key(0))
    state = tx.init(params)
    generator = np.random.default_rng(0)
    losses, before, after = [], [], []
    for mini_batch in range(1, MINI_BATCHES + 1):
        rows = generator.integers(len(x), size=BATCH)
        params, state, loss = train_step(params, state, x[rows], y[rows])
        losses.append(float(loss))
        if mini_batch % EVERY == 0:
            before.append(jnp.asarray(optax.tree.get(state, "norm_before")))
            after.append(jnp.asarray(optax.tree.get(state, "norm_after")))

    updates = np.arange(1, len(before) + 1)
    count = optax.tree.get(state, "count", filtering=lambda path, _: "ScaleByAdamState" in str(path))
    print(f"mini-batches: {MINI_BATCHES}, updates: {state.gradient_step}, Adam's count: {count}")
    print(f"clipped: {np.mean(np.array(before) > MAX_NORM):.0%} of the updates; largest norm after: {max(after):.4f}")
    print(f"loss: first update {np.mean(losses[:EVERY]):.3f}, last 10 updates {np.mean(losses[-10 * EVERY :]):.3f}")
    print(f"test accuracy: {np.mean(model(params, jnp.asarray(x_test)).argmax(axis=1) == y_test):.3f}")

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.2))
    red, blue = picture.COLORS["Adam"], picture.COLORS["momentum"]
    left.plot(updates, jax.vmap(schedule)(updates - 1), color=red)
    left.set(xlabel="update", title="learning rate of Adam's group")
    middle.plot(updates, before, color=blue)
    middle.plot(updates, after, color=red)
    middle.set(xlabel="update", title="gradient norm (nats)", ylim=(0, None))
    picture.label(middle, 64, 0.7, "before clipping", blue)
    picture.label(middle, 64, MAX_NORM, f"after: at most {MAX_NORM}", red)
    right.plot(np.arange(1, MINI_BATCHES + 1) / EVERY, losses, color=red, alpha=0.3, linewidth=0.8)
    right.plot(updates, np.reshape(losses, (-1, EVERY)).mean(axis=1), color=red)
    picture.label(right, 90, 0.5, "mini-batches,", red)
    picture.label(right, 90, 0.3, f"and the mean of each {EVERY}", red)
    right.set(yscale="log", xlabel="update", title="training loss (nats)")
    picture.save(figure, out / "optax_pipeline.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
