"""A training loop in Flax Linen: a `TrainState` carries parameters, optimizer and its state.

You will see a small network with dropout learn to tell benign from malignant tumours (scikit-learn's breast cancer
data, 30 standardized features). What to learn: `TrainState.create(tx=...)` takes an adamite optimizer as it takes any
of Optax's. Flax's train state updates; that of `adamite.flax` steps in one pass, and the line that imports it is the
one that changes. The step donates the train state, so that all of it is written in place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import picture
from flax import linen as nn
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import adamite
from adamite.flax import TrainState

EPOCHS, BATCH, WIDTH, DROPOUT = 30, 32, 32, 0.2


class Classifier(nn.Module):
    """Two layers with dropout between them."""

    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Logits."""
        hidden = nn.relu(nn.Dense(WIDTH)(x))
        hidden = nn.Dropout(DROPOUT, deterministic=not training)(hidden)
        return nn.Dense(2)(hidden)


@jax.jit(donate_argnames="state")
def train_step(state: TrainState, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: optax.Params) -> jax.Array:
        dropout_key = jax.random.fold_in(key, state.step)
        logits = state.apply_fn({"params": params}, x, training=True, rngs={"dropout": dropout_key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


@jax.jit
def accuracy(state: TrainState, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = state.apply_fn({"params": state.params}, x, training=False)
    return jnp.mean(logits.argmax(axis=1) == y)


def main(out: Path) -> None:
    data = train_test_split(*load_breast_cancer(return_X_y=True), test_size=0.3, random_state=0)
    scaler = StandardScaler().fit(data[0])
    x, x_test, y, y_test = map(jnp.asarray, (scaler.transform(data[0]), scaler.transform(data[1]), *data[2:]))

    steps, (init_key, shuffle_key, dropout_key) = len(x) // BATCH, jax.random.split(jax.random.key(0), 3)
    model = Classifier()
    params = model.init(init_key, x[:1], training=False)["params"]
    tx = adamite.adamw(learning_rate=3e-3, weight_decay=1e-2)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses, accuracies = [], []
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), len(x))
        for rows in order[: steps * BATCH].reshape(steps, BATCH):
            state, loss = train_step(state, x[rows], y[rows], dropout_key)
            losses.append(float(loss))
        accuracies.append(float(accuracy(state, x_test, y_test)))

    print(f"loss: first step {losses[0]:.3f}, last epoch {sum(losses[-steps:]) / steps:.3f}")
    print(f"test accuracy: {accuracies[-1]:.3f}")
    picture.training("Flax Linen", losses, accuracies, out / "flax_linen.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
