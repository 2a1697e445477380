"""A training loop in Flax NNX: the model and the optimizer are objects that `nnx.jit` updates in place.

You will see a small network with dropout learn to tell benign from malignant tumours (scikit-learn's breast cancer
data, 30 standardized features). What to learn: `nnx.Optimizer` takes an adamite optimizer as it takes any of Optax's.
`adamite.flax.Optimizer` in its place steps in one pass, and the line that builds the optimizer is the one that changes.
The step donates model and optimizer, so that both are written in place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import picture
from flax import nnx
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import adamite
from adamite.flax import Optimizer

EPOCHS, BATCH, WIDTH, DROPOUT = 30, 32, 32, 0.2


class Classifier(nnx.Module):
    """Two layers with dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(30, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
        self.output = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        return self.output(self.dropout(nnx.relu(self.hidden(x))))


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Classifier, optimizer: Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_fn(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(model(x).argmax(axis=1) == y)


def main(out: Path) -> None:
    data = train_test_split(*load_breast_cancer(return_X_y=True), test_size=0.3, random_state=0)
    scaler = StandardScaler().fit(data[0])
    x, x_test, y, y_test = map(jnp.asarray, (scaler.transform(data[0]), scaler.transform(data[1]), *data[2:]))

    steps, rngs = len(x) // BATCH, nnx.Rngs(0)
    model = Classifier(rngs)
    optimizer = Optimizer(model, adamite.adamw(learning_rate=3e-3, weight_decay=1e-2), wrt=nnx.Param)
    losses, accuracies = [], []
    for _ in range(EPOCHS):
        model.train()
        for rows in jax.random.permutation(rngs(), len(x))[: steps * BATCH].reshape(steps, BATCH):
            losses.append(float(train_step(model, optimizer, x[rows], y[rows])))
        model.eval()
        accuracies.append(float(accuracy(model, x_test, y_test)))

    print(f"loss: first step {losses[0]:.3f}, last epoch {sum(losses[-steps:]) / steps:.3f}")
    print(f"test accuracy: {accuracies[-1]:.3f}")
    picture.training("Flax NNX", losses, accuracies, out / "flax_nnx.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
