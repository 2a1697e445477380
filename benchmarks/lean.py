"""Does training with 7 bytes per parameter, or 6, end at the loss of 16? `make bench-lean`.

Two problems, a classifier of digits and a character language model, are each learned by AdamW, its learning rate
falling along a cosine to a hundredth, with every way to keep the moments and the weights. A seed sets the initial
weights and the minibatches, the same for every configuration. Where weights are bfloat16, the model sees nothing else,
and their gradients are bfloat16, too; the model computes in float32.

Loss is that of held-out data after the last step: mean and standard deviation over seeds, and the difference of the
mean from float32's, once in float32's standard deviations, once in nats with the standard error of the paired
differences. Bytes are those of the arrays: weights, gradients and optimizer state. Milliseconds are those of a whole
training step, the least of several calls of 50, the configurations in turns.

optax's plain bfloat16, moments and all in the weights' dtype, is there to show what the others avoid.
"""

import argparse
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import in_turns, machine
from sklearn.datasets import load_digits

import adamite

CHUNK = 50  # steps in one call
PEAK, END = 1e-3, 1e-5  # learning rate
WEIGHT_DECAY = 0.1
CONTEXT, WIDTH = 16, 48  # characters that the language model sees, numbers for each

Layers = list[dict[str, jax.Array]]
Batch = tuple[jax.Array, jax.Array]  # inputs and labels


class Problem(NamedTuple):
    """What is learned."""

    draw: Callable[[jax.Array], Any]  # key -> float32 parameters
    batch: Callable[[jax.Array], Batch]  # key -> a minibatch
    scores: Callable[[Any, jax.Array], jax.Array]  # float32 parameters, inputs -> scores
    held_out: Batch

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats."""
        inputs, labels = batch
        scores = self.scores(jax.tree.map(lambda p: p.astype(jnp.float32), params), inputs)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def draw_layers(key: jax.Array, widths: Sequence[int]) -> Layers:
    keys = jax.random.split(key, len(widths) - 1)
    shapes = zip(keys, widths[:-1], widths[1:], strict=True)
    return [{"kernel": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)} for k, n, m in shapes]


def through_layers(layers: Layers, x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def digits() -> Problem:
    """1,797 images of 8 x 8 pixels, behind noise that is drawn anew each time; every fourth image is held out."""
    images, shown = load_digits(return_X_y=True)
    pixels, labels = jnp.asarray((images - images.mean()) / images.std(), jnp.float32), jnp.asarray(shown, jnp.int32)
    held = jnp.arange(len(labels)) % 4 == 0
    train_pixels, train_labels = pixels[~held], labels[~held]

    def noisy(key: jax.Array, pixels: jax.Array) -> jax.Array:
        return pixels + jax.random.normal(key, pixels.shape)

    def batch(key: jax.Array) -> Batch:
        which, noise = jax.random.split(key)
        chosen = jax.random.randint(which, (32,), 0, len(train_labels))
        return noisy(noise, train_pixels[chosen]), train_labels[chosen]

    held_out = noisy(jax.random.key(0), jnp.tile(pixels[held], (16, 1))), jnp.tile(labels[held], 16)
    return Problem(lambda key: draw_layers(key, [64, 128, 512, 10]), batch, through_layers, held_out)


def language() -> Problem:
    """The Python reference's next character from the 16 before it; the last tenth of the text is held out."""
    paragraphs = dict.fromkeys("\n\n".join(topics.topics.values()).split("\n\n"))
    text = "\n\n".join(p for p in paragraphs if not re.search(r"(.)\1{9}", p))  # no tables, no underlined headings
    alphabet = sorted(set(text))
    characters = jnp.asarray(np.searchsorted(alphabet, list(text)), jnp.int32)
    train, held = jnp.split(characters, [len(characters) * 9 // 10])

    def windows(text: jax.Array, starts: jax.Array) -> Batch:
        return text[starts[:, None] + jnp.arange(CONTEXT)], text[starts + CONTEXT]

    def draw(key: jax.Array) -> dict[str, Any]:
        first, rest = jax.random.split(key)
        layers = draw_layers(rest, [CONTEXT * WIDTH, 768, 512, len(alphabet)])
        return {"characters": jax.random.normal(first, (len(alphabet), WIDTH)), "layers": layers}

    def batch(key: jax.Array) -> Batch:
        return windows(train, jax.random.randint(key, (16,), 0, len(train) - CONTEXT))

    def scores(params: dict[str, Any], characters: jax.Array) -> jax.Array:
        x = params["characters"][characters]
        return through_layers(params["layers"], x.reshape(len(x), -1))

    return Problem(draw, batch, scores, windows(held, jnp.arange(len(held) - CONTEXT)))


class Configuration(NamedTuple):
    """How numbers are kept."""

    moments: Any  # None: by optax, in the weights' dtype
    rounding: str | None  # of bfloat16 weights; None: weights are float32

    @property
    def names(self) -> tuple[str, str]:
        """Of the moments and of the weights, for tables."""
        if self.moments is None:
            return "optax", "bfloat16"
        return self.moments if isinstance(self.moments, str) else ", ".join(self.moments), self.rounding or "float32"

    @property
    def recommended(self) -> bool:
        """Whether the final loss should be float32's."""
        return self.moments in ("bfloat16", "int8") and self.rounding != "nearest"

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW, for so many steps."""
        schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 20, steps, END)
        if self.moments is None:
            return optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
        return adamite.adamw(schedule, weight_decay=WEIGHT_DECAY, moments=self.moments, rounding=self.rounding)


MOMENTS, WEIGHTS = ("float32", "bfloat16", "int8"), (None, "nearest", "stochastic", "residual8")
GRID = [Configuration(moments, rounding) for moments in MOMENTS for rounding in WEIGHTS]  # float32 first
CONFIGURATIONS = [*GRID, Configuration(("int8", "float8"), "residual8"), Configuration(None, "nearest")]


class Training:
    """A configuration on a problem, compiled once for all seeds."""

    def __init__(self, problem: Problem, configuration: Configuration, steps: int) -> None:
        tx = configuration.optimizer(steps)
        self.steps, self.problem = steps, problem

        def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            grads = jax.grad(problem.loss)(params, problem.batch(key))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def start(key: jax.Array) -> tuple[Any, Any]:
            dtype = jnp.bfloat16 if configuration.rounding else jnp.float32
            params = jax.tree.map(lambda p: p.astype(dtype), problem.draw(key))
            return params, tx.init(params)

        self.start = jax.jit(start)
        self.advance = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0], donate_argnums=0)
        self.loss = jax.jit(problem.loss)

    def final_loss(self, seed: int) -> float:
        """Train from that seed."""
        first, rest = jax.random.split(jax.random.key(seed))
        carry, keys = self.start(first), jax.random.split(rest, self.steps)
        for step in range(0, self.steps, CHUNK):
            carry = self.advance(carry, keys[step : step + CHUNK])
        return float(self.loss(carry[0], self.problem.held_out))

    def to_time(self) -> Callable[[], Any]:
        """What makes one call, of a chunk of steps."""
        keys = jax.random.split(jax.random.key(0), min(CHUNK, self.steps))
        carry = jax.block_until_ready(self.start(keys[0]))
        return lambda: jax.block_until_ready(self.advance(carry, keys))

    def bytes_per_parameter(self) -> float:
        """Of weights, gradients and state."""
        params, state = jax.eval_shape(self.start, jax.random.key(0))
        grads = jax.eval_shape(jax.grad(self.problem.loss), params, self.problem.held_out)
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, grads, state)))
        return nbytes / size(params)


def size(params: Any) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def compare(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Losses of some seeds beside float32's of the same seeds."""
    paired = [a - b for a, b in zip(losses, reference, strict=True)]
    difference = statistics.fmean(paired)
    return {
        "mean": statistics.fmean(losses),
        "standard deviation": statistics.stdev(losses),
        "difference": difference,
        "standard error of the difference": statistics.stdev(paired) / len(paired) ** 0.5,
        "difference in float32's standard deviations": difference / statistics.stdev(reference),
    }


def measure(
    problem: Problem, configurations: Sequence[Configuration], steps: int, seeds: int, rounds: int, jobs: int
) -> dict[str, Any]:
    trainings = {"/".join(c.names): Training(problem, c, steps) for c in configurations}
    with ThreadPoolExecutor(jobs) as pool:
        runs = {name: [pool.submit(t.final_loss, seed) for seed in range(seeds)] for name, t in trainings.items()}
        losses = {}
        for name, of_seeds in runs.items():
            losses[name] = [run.result() for run in of_seeds]
            print(f"  {name}: {statistics.fmean(losses[name]):.4f}", flush=True)
    times = in_turns({name: t.to_time for name, t in trainings.items()}, rounds)
    reference, *_ = losses.values()
    rows = []
    for c, (name, training) in zip(configurations, trainings.items(), strict=True):
        moments, weights = c.names
        row = {"moments": moments, "weights": weights, "recommended": c.recommended}
        row["bytes per parameter"] = training.bytes_per_parameter()
        row["ms per step"] = 1e3 * min(times[name]) / min(CHUNK, steps)
        rows.append({**row, **compare(losses[name], reference), "losses": losses[name]})
    return {"parameters": size(jax.eval_shape(problem.draw, jax.random.key(0))), "configurations": rows}


def print_table(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}, {result['parameters']:,} parameters")
    print(f"{'moments':15}{'weights':12}{'bytes':>6}{'ms':>7}{'loss':>18}{'difference':>21}{'in sd':>8}")
    for row in result["configurations"]:
        loss = f"{row['mean']:.4f} +- {row['standard deviation']:.4f}"
        difference = f"{row['difference']:+.4f} +- {row['standard error of the difference']:.4f}"
        figures = f"{row['bytes per parameter']:6.2f}{row['ms per step']:7.2f}{loss:>18}{difference:>21}"
        in_sd = row["difference in float32's standard deviations"]
        mark = "" if not row["recommended"] else "  recommended" if abs(in_sd) <= 1 else "  recommended, BUT"
        print(f"{row['moments']:15}{row['weights']:12}{figures}{in_sd:+8.2f}{mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Final loss, bytes and time of lean training beside float32.")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (default 2000)")
    parser.add_argument("--seeds", type=int, default=6, help="trainings of each configuration (default 6)")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each configuration (default 11)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on about one core (default 2)")
    parser.add_argument("--quick", action="store_true", help="2 steps, 2 seeds, 4 configurations: see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/lean.json"))
    options = parser.parse_args()
    configurations = CONFIGURATIONS
    if options.quick:
        options.steps, options.seeds, options.rounds = 2, 2, 1
        configurations = [GRID[0], GRID[6], *CONFIGURATIONS[-2:]]
    result = {"machine": machine(), "steps": options.steps, "seeds": options.seeds, "problems": {}}
    print(json.dumps(result["machine"]))
    for problem in (digits, language):
        start = time.perf_counter()
        print(f"\n{problem.__name__}, final loss:")
        figures = measure(problem(), configurations, options.steps, options.seeds, options.rounds, options.jobs)
        result["problems"][problem.__name__] = figures
        print_table(problem.__name__, figures)
        print(f"{time.perf_counter() - start:.0f} s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
