"""Which optimizer trains a small classifier best, when each gets the learning rate that suits it?

1,797 real images of handwritten digits, 8 x 8 pixels, are cleaned, split 60:20:20 with every digit's share kept, and
standardized with the training images' mean and deviation. One network then learns them once per optimizer, from the
same initial parameters, with the same minibatches and the same dropout. Each optimizer tries the same learning rates
and keeps the one with the least loss on the validation images; the test images choose nothing.

Minibatches and dropout are functions of (seed, epoch): whoever starts again gets the same bits.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoint import Run
from flax import nnx
from networks import Classifier, fingerprint, functional, kernels
from report import Report
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

import adamite

BATCH = 32
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

Maker = Callable[[float | jax.Array], optax.GradientTransformation]
OPTIMIZERS: dict[str, Maker] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adam": adamite.adam,
    "adamw": lambda learning_rate: adamite.adamw(learning_rate, weight_decay=0.1, mask=kernels),
}


class Images(NamedTuple):
    """Images and what they show."""

    pixels: jax.Array  # float32, shape (images, pixels), standardized
    labels: jax.Array  # int32, shape (images,)


class Splits(NamedTuple):
    """Images to train on, to choose learning rates by, and to judge by."""

    train: Images
    validation: Images
    test: Images


class Task(NamedTuple):
    """What every optimizer is given."""

    structure: Any  # of the network
    params: Any  # that it starts from
    splits: Splits
    epochs: int
    seed: int


class Epoch(NamedTuple):
    """What an epoch of training has come to."""

    params: Any
    state: Any
    loss: float  # nats per image, mean over the epoch's minibatches, with dropout
    seconds_per_step: float


def load(seed: int) -> tuple[Splits, str]:
    """The images, cleaned, split and standardized; and in words what the cleaning did."""
    pixels, labels = load_digits(return_X_y=True)
    whole = np.flatnonzero(np.isfinite(pixels).all(axis=1))
    kept = whole[np.sort(np.unique(pixels[whole], axis=0, return_index=True)[1])]
    train, rest = train_test_split(kept, train_size=0.6, stratify=labels[kept], random_state=seed)
    validation, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=seed)

    mean, deviation = pixels[train].mean(axis=0), pixels[train].std(axis=0)
    varies = deviation > 0

    def images(rows: Any) -> Images:
        standardized = (pixels[rows] - mean)[:, varies] / deviation[varies]
        return Images(jnp.asarray(standardized, jnp.float32), jnp.asarray(labels[rows], jnp.int32))

    story = (
        f"{len(pixels):,} images: dropped {len(pixels) - len(whole)} with missing pixels, {len(whole) - len(kept)} "
        f"duplicates and {np.sum(~varies)} of {varies.size} pixels that never change; "
        f"{len(train):,} to train, {len(validation)} to tune, {len(test)} to test"
    )
    return Splits(images(train), images(validation), images(test)), story


def loss_of(structure: Any, params: Any, images: Images, dropout: jax.Array | None = None) -> jax.Array:
    """Cross-entropy in nats per image; `dropout` is the random key of what is dropped, None for nothing."""
    scores = nnx.merge(structure, params)(images.pixels, None if dropout is None else nnx.Rngs(dropout=dropout))
    return optax.softmax_cross_entropy_with_integer_labels(scores, images.labels).mean()


@functools.partial(jax.jit, static_argnames="images")
def shuffle(seed: int, epoch: int, images: int) -> tuple[jax.Array, jax.Array]:
    """The row numbers of an epoch's minibatches, shape (steps, BATCH), and a dropout key for each step."""
    order, dropout = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch))
    steps = images // BATCH
    return jax.random.permutation(order, images)[: steps * BATCH].reshape(steps, BATCH), jax.random.split(
        dropout, steps
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_epoch(
    structure: Any, make: Maker, learning_rate: float, params: Any, state: Any, images: Images, batches: Any
) -> tuple[Any, Any, jax.Array]:
    """One pass over the minibatches: new parameters, new optimizer state, mean loss."""
    optimizer = make(learning_rate)

    def step(carry: tuple[Any, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
        (params, state), (rows, dropout) = carry, batch
        few = Images(images.pixels[rows], images.labels[rows])
        loss, gradients = jax.value_and_grad(loss_of, argnums=1)(structure, params, few, dropout)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), batches)
    return params, state, losses.mean()


@functools.partial(jax.jit, static_argnums=0)
def judge(structure: Any, params: Any, images: Images) -> tuple[jax.Array, jax.Array]:
    """The loss in nats per image, and the digit that the network sees in each."""
    return loss_of(structure, params, images), nnx.merge(structure, params)(images.pixels).argmax(axis=-1)


def fit(task: Task, make: Maker, learning_rate: float) -> Iterator[Epoch]:
    """Train the network, an epoch at a time."""
    params, state = task.params, make(learning_rate).init(task.params)
    for number in range(task.epochs):
        batches = jax.block_until_ready(shuffle(task.seed, number, len(task.splits.train.labels)))
        began = time.perf_counter()
        params, state, loss = jax.block_until_ready(
            train_epoch(task.structure, make, learning_rate, params, state, task.splits.train, batches)
        )
        yield Epoch(params, state, float(loss), (time.perf_counter() - began) / len(batches[0]))


def tune(task: Task, make: Maker, run: Run) -> dict[float, float]:
    """Each learning rate, and the loss on the validation images that it ends with; infinite where it diverged."""
    losses = {}
    for learning_rate in LEARNING_RATES:
        params = task.params
        for epoch in fit(task, make, learning_rate):
            params = epoch.params
            run.pause()
        loss = float(judge(task.structure, params, task.splits.validation)[0])
        losses[learning_rate] = loss if math.isfinite(loss) else math.inf
    return losses


def measure(task: Task, make: Maker, run: Run) -> dict[str, Any]:
    """Tune an optimizer, then train with it at its best: numbers for the record."""
    validation = tune(task, make, run)
    learning_rate = min(LEARNING_RATES, key=lambda rate: validation[rate])
    test, last = task.splits.test, task.epochs - 1
    epochs, seen = [], []
    for epoch in fit(task, make, learning_rate):
        epochs.append(epoch)
        seen.append(np.asarray(judge(task.structure, epoch.params, test)[1]))
        run.pause()
    return {
        "learning_rate": learning_rate,
        "validation_loss": {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in validation.items()},
        "loss": [epoch.loss for epoch in epochs],
        "test_accuracy": [float(np.mean(digits == test.labels)) for digits in seen],
        "confusion": confusion_matrix(test.labels, seen[last], labels=range(10)).tolist(),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(epochs[last].state)),
        "params_sha256": fingerprint(epochs[last].params),
        "ms_per_step": 1000 * statistics.median(epoch.seconds_per_step for epoch in epochs),
    }


def compare(names: Sequence[str], epochs: int, seed: int, run: Run, report: Report) -> None:
    """Measure each optimizer that the run has no record of yet, then say how each epoch went."""
    splits, story = load(seed)
    report.say(f"\nDigits: {story}.")
    structure, params = functional(Classifier(splits.train.pixels.shape[1], 10, nnx.Rngs(seed)))
    task = Task(structure, params, splits, epochs, seed)

    done = run.record.setdefault("digits", {})
    with report.progress("digits", len(names)) as advance:
        for name in names:
            if name not in done:
                done[name] = measure(task, OPTIMIZERS[name], run)
                run.pause(save=True)
            report.say(f"  {name:8} learns best, of {len(LEARNING_RATES)} rates, at {done[name]['learning_rate']:g}")
            advance()

    def cell(name: str, epoch: int) -> str:
        return f"{done[name]['loss'][epoch]:.3f} {100 * done[name]['test_accuracy'][epoch]:5.1f}"

    report.say("\nAfter each epoch: loss on the training minibatches (nats per image), accuracy on the test images (%)")
    report.table(["epoch", *names], [[str(e + 1), *(cell(name, e) for name in names)] for e in range(epochs)])


def summarize(digits: dict[str, Any], report: Report) -> None:
    """The final table."""
    images = np.sum(next(iter(digits.values()))["confusion"])
    report.say(f"\nDigits, each optimizer at its best learning rate (one of {images} test images is {1 / images:.1%})")
    report.table(
        ["optimizer", "learning rate", "final loss", "test accuracy", "ms per step", "state bytes"],
        [
            [
                name,
                f"{log['learning_rate']:g}",
                f"{log['loss'][-1]:.4f}",
                f"{log['test_accuracy'][-1]:.1%}",
                f"{log['ms_per_step']:.3f}",
                f"{log['state_bytes']:,}",
            ]
            for name, log in digits.items()
        ],
    )
