"""Data-parallel training on eight devices with `jax.pmap`: every device holds the model and an eighth of the batch.

Each step, a device computes the gradient of its part, `jax.lax.pmean` averages the gradients, and every device takes
the same Adam step. Eight CPU devices are simulated; on a machine with eight accelerators leave out the two lines that
ask for them. You will see the loss of each device and their mean over the training of a small network (scikit-learn's
digits), and how far mu and nu are from those of a run on one device with the whole batch.

What to learn: the optimizer needs to know nothing of devices. Replicas that start equal and see the same mean gradient
stay equal, to the bit. The run on one device differs by rounding alone: a mean of eight means is summed in another
order than one mean over all.
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

DEVICES, BATCH, STEPS, WIDTH = 8, 256, 150, 32
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)

tx = adamite.adam(learning_rate=3e-3)


def init(key: jax.Array) -> dict[str, jax.Array]:
    keys, he = jax.random.split(key), jax.nn.initializers.he_normal()
    return {
        "w1": he(keys[0], (64, WIDTH)),
        "b1": jnp.zeros(WIDTH),
        "w2": he(keys[1], (WIDTH, 10)),
        "b2": jnp.zeros(10),
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train_step(
    params: dict[str, jax.Array], state: optax.OptState, x: jax.Array, y: jax.Array, *, axis: str | None
) -> tuple[optax.Params, optax.OptState, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_fn)(params, x, y)
    if axis is not None:
        gradients = jax.lax.pmean(gradients, axis)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


parallel_step = jax.pmap(partial(train_step, axis="devices"), axis_name="devices")
single_step = jax.jit(partial(train_step, axis=None))


def replicate(tree: Any) -> Any:
    """A copy for every device, along a new leading axis."""
    return jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tree)


def identical(tree: Any) -> bool:
    """Whether all replicas are equal to the bit."""
    return all(len({replica.tobytes() for replica in np.asarray(x)}) == 1 for x in jax.tree.leaves(tree))


def difference(replicated: optax.OptState, single: optax.OptState, moment: str) -> float:
    """Largest difference of a moment between the first replica and the run on one device."""
    pairs = zip(*(jax.tree.leaves(optax.tree.get(state, moment)) for state in (replicated, single)), strict=True)
    return max(float(np.abs(np.asarray(a)[0] - np.asarray(b)).max()) for a, b in pairs)


def main(out: Path) -> None:
    images, digits = load_digits(return_X_y=True)
    params = init(jax.random.key(0))
    single = params, tx.init(params)
    replicas = replicate(single)
    losses, differences = [], {"mu": [], "nu": []}
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = generator.integers(len(images), size=BATCH)
        x, y = np.float32(images[rows] / 16), digits[rows]
        *single, _ = single_step(*single, x, y)
        *replicas, loss = parallel_step(*replicas, x.reshape(DEVICES, -1, 64), y.reshape(DEVICES, -1))
        losses.append(np.asarray(loss))
        for moment, values in differences.items():
            values.append(difference(replicas[1], single[1], moment))

    print(f"devices: {jax.device_count()}, samples a device: {BATCH // DEVICES}")
    print(f"replicas identical to the bit: {identical(replicas)}")
    for moment, values in differences.items():
        print(f"{moment}: largest difference from one device {max(values):.1e}")
    print(f"mean loss: first step {losses[0].mean():.3f}, last step {losses[-1].mean():.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
    steps = np.arange(1, STEPS + 1)
    left.plot(steps, losses, color=picture.COLORS["momentum"], linewidth=0.6, alpha=0.5)
    left.plot(steps, np.mean(losses, axis=1), color=picture.COLORS["Adam"], linewidth=2)
    left.set(yscale="log", xlabel="step", title="training loss (nats)")
    picture.label(left, 95, 1.3, "each device", picture.COLORS["momentum"])
    picture.label(left, 95, 0.98, "their mean", picture.COLORS["Adam"])
    for (moment, values), color in zip(differences.items(), (picture.COLORS["Adam"], "#404040"), strict=True):
        right.plot(steps, values, color=color)
        picture.label(right, STEPS, values[-1], moment, color)
    right.set(yscale="log", xlabel="step", title="largest difference from the run on one device")
    picture.save(figure, out / "pmap_eight.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
