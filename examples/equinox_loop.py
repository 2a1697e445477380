"""A training loop in Equinox: the model is a pytree, and so it is its own parameters.

You will see a small network with dropout learn to tell benign from malignant tumours (scikit-learn's breast cancer
data, 30 standardized features). What to learn: a model holds things that are not arrays (activations, dropout rates),
so the state is made for its arrays only: `tx.init(eqx.filter(model, eqx.is_inexact_array))`. One line steps the whole
model in one pass, in place of `tx.update` and `eqx.apply_updates`: `model, state = tx.step(gradients, state, model)`.
Where the gradient is None, adamite leaves alone whatever stands there. `tx.step` keeps the weights' dtype;
`eqx.apply_updates` does not: with a rounding it would turn bfloat16 weights into float32. The step donates model and
state, all but its first argument, so that both are written in place.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import picture
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import adamite

EPOCHS, BATCH, WIDTH, DROPOUT = 30, 32, 32, 0.2

tx = adamite.adamw(learning_rate=3e-3, weight_decay=1e-2)


class Classifier(eqx.Module):
    """Two layers with dropout between them, for one sample."""

    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    output: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(30, WIDTH, key=keys[0])
        self.dropout = eqx.nn.Dropout(DROPOUT)
        self.output = eqx.nn.Linear(WIDTH, 2, key=keys[1])

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Logits."""
        return self.output(self.dropout(jax.nn.relu(self.hidden(x)), key=key))


@eqx.filter_jit(donate="all-except-first")
def train_step(
    batch: tuple[jax.Array, jax.Array, jax.Array], model: Classifier, state: optax.OptState
) -> tuple[Classifier, optax.OptState, jax.Array]:
    x, y, key = batch

    def loss_fn(model: Classifier) -> jax.Array:
        logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, gradients = eqx.filter_value_and_grad(loss_fn)(model)
    model, state = tx.step(gradients, state, model)
    return model, state, loss


@eqx.filter_jit
def accuracy(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jax.vmap(eqx.nn.inference_mode(model))(x)
    return jnp.mean(logits.argmax(axis=1) == y)


def main(out: Path) -> None:
    data = train_test_split(*load_breast_cancer(return_X_y=True), test_size=0.3, random_state=0)
    scaler = StandardScaler().fit(data[0])
    x, x_test, y, y_test = map(jnp.asarray, (scaler.transform(data[0]), scaler.transform(data[1]), *data[2:]))

    steps, key = len(x) // BATCH, jax.random.key(0)
    model = Classifier(key)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    losses, accuracies = [], []
    for _ in range(EPOCHS):
        key, shuffle_key = jax.random.split(key)
        for rows in jax.random.permutation(shuffle_key, len(x))[: steps * BATCH].reshape(steps, BATCH):
            key, dropout_key = jax.random.split(key)
            model, state, loss = train_step((x[rows], y[rows], dropout_key), model, state)
            losses.append(float(loss))
        accuracies.append(float(accuracy(model, x_test, y_test)))

    print(f"loss: first step {losses[0]:.3f}, last epoch {sum(losses[-steps:]) / steps:.3f}")
    print(f"test accuracy: {accuracies[-1]:.3f}")
    picture.training("Equinox", losses, accuracies, out / "equinox_loop.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
