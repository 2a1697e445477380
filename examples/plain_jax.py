"""A training loop in plain JAX: parameters are a dict, the model is a function, `jax.jit` compiles the step.

You will see a small network with dropout learn to tell benign from malignant tumours (scikit-learn's breast cancer
data, 30 standardized features). What to learn: an optimizer is pure functions, and its state is one more value that a
step takes and returns. `tx.step` is `tx.update` and `optax.apply_updates` in one line and one pass. The step donates
parameters and state, so that both are written in place. flax_nnx.py, flax_linen.py and equinox_loop.py are the same
loop in the idiom of each framework.
"""

from pathlib import Path

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


def init(key: jax.Array) -> dict[str, jax.Array]:
    keys, he = jax.random.split(key), jax.nn.initializers.he_normal()
    return {
        "w1": he(keys[0], (30, WIDTH)),
        "b1": jnp.zeros(WIDTH),
        "w2": he(keys[1], (WIDTH, 2)),
        "b2": jnp.zeros(2),
    }


def model(params: dict[str, jax.Array], x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits, shape (batch, 2). With a key, dropout is on."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - DROPOUT, hidden.shape)
        hidden = jnp.where(keep, hidden / (1 - DROPOUT), 0)
    return hidden @ params["w2"] + params["b2"]


@jax.jit(donate_argnames=("params", "state"))
def train_step(
    params: dict[str, jax.Array], state: optax.OptState, x: jax.Array, y: jax.Array, key: jax.Array
) -> tuple[dict[str, jax.Array], optax.OptState, jax.Array]:
    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x, key), y).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    params, state = tx.step(gradients, state, params)
    return params, state, loss


@jax.jit
def accuracy(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(model(params, x).argmax(axis=1) == y)


def main(out: Path) -> None:
    data = train_test_split(*load_breast_cancer(return_X_y=True), test_size=0.3, random_state=0)
    scaler = StandardScaler().fit(data[0])
    x, x_test, y, y_test = map(jnp.asarray, (scaler.transform(data[0]), scaler.transform(data[1]), *data[2:]))

    steps, key = len(x) // BATCH, jax.random.key(0)
    params = init(key)
    state = tx.init(params)
    losses, accuracies = [], []
    for _ in range(EPOCHS):
        key, shuffle_key = jax.random.split(key)
        for rows in jax.random.permutation(shuffle_key, len(x))[: steps * BATCH].reshape(steps, BATCH):
            key, dropout_key = jax.random.split(key)
            params, state, loss = train_step(params, state, x[rows], y[rows], dropout_key)
            losses.append(float(loss))
        accuracies.append(float(accuracy(params, x_test, y_test)))

    print(f"loss: first step {losses[0]:.3f}, last epoch {sum(losses[-steps:]) / steps:.3f}")
    print(f"test accuracy: {accuracies[-1]:.3f}")
    picture.training("plain JAX", losses, accuracies, out / "plain_jax.png")


if __name__ == "__main__":
    main(picture.folder(__doc__))
