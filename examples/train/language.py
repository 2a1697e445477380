"""How does a small transformer learn to write, one character at a time?

The text is the Python reference that the standard library carries (`pydoc_data.topics`), real English with some code.
Paragraphs that it repeats are dropped, so that the last tenth, held out, holds none that was trained on; so are tables
and underlined headings, which a run of ten equal characters gives away. The optimizer is Adam with decoupled weight
decay on matrices only, behind clipping by the global norm, at a learning rate that rises and then falls along a cosine.
A guard leaves out steps that are not finite. One jitted function is a whole step; it reuses the memory of what it
replaces.

The minibatch is a function of (seed, step): whoever goes on from a checkpoint gets the same bits. With `broken`, one
that is NaN comes before every so many good ones, to show that it leaves no trace: the results are the same.
"""

import functools
import math
import re
import statistics
import textwrap
import time
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoint import Run
from flax import nnx
from networks import Transformer, fingerprint, functional, kernels
from report import Report

import adamite

CONTEXT = 64  # characters that a prediction sees at most
BATCH = 32
PROMPT = "If the name is not found in the module, the import statement "
TEMPERATURE = 0.7  # below 1: likely characters are drawn more often than predicted
SAMPLE = 600  # characters that are written
SHOWN = 300  # of which so many on the screen
HEADER = ("step", "loss", "validation loss", "tokens/s")


class Corpus(NamedTuple):
    """Characters as numbers."""

    train: jax.Array  # int32, shape (characters,)
    validation: jax.Array  # the same
    alphabet: str  # the character of each number


def load() -> tuple[Corpus, str]:
    """The text, cleaned and split; and in words what the cleaning did."""
    whole = "\n\n".join(topics.topics.values())
    paragraphs = dict.fromkeys(whole.split("\n\n"))
    text = "\n\n".join(paragraph for paragraph in paragraphs if not re.search(r"(.)\1{9}", paragraph))
    alphabet = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(alphabet)}
    tokens = jnp.asarray([numbers[character] for character in text], jnp.int32)
    train, validation = jnp.split(tokens, [len(tokens) * 9 // 10])
    story = (
        f"{len(whole):,} characters: dropped {len(whole) - len(text):,} in paragraphs that repeat or are tables; "
        f"{len(train):,} to train, the last {len(validation):,} held out; {len(alphabet)} different characters"
    )
    return Corpus(train, validation, alphabet), story


def make_optimizer(steps: int) -> adamite.Optimizer:
    """Clipping, then AdamW: warm-up over a tenth of the steps, then a cosine down to a thirtieth of the peak."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps, end_value=1e-4)
    adamw = adamite.adamw(schedule, b2=0.99, weight_decay=0.1, mask=kernels)
    return adamite.skip_nonfinite(adamite.chain(optax.clip_by_global_norm(1.0), adamw))


def loss_of(structure: Any, params: Any, windows: jax.Array) -> jax.Array:
    """Cross-entropy in nats per character, of windows of shape (batch, CONTEXT + 1)."""
    scores = nnx.merge(structure, params)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, windows[:, 1:]).mean()


evaluate = jax.jit(loss_of, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(
    structure: Any,
    optimizer: adamite.Optimizer,
    params: Any,
    state: Any,
    text: jax.Array,
    seed: int,
    step: int,
    scale: float = 1.0,
) -> tuple[Any, Any, jax.Array]:
    """Draw a minibatch, and learn from it, its loss times `scale`: new parameters, new optimizer state, loss."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (BATCH, 1), 0, len(text) - CONTEXT)
    windows = text[starts + jnp.arange(CONTEXT + 1)]
    loss, gradients = jax.value_and_grad(lambda params: scale * loss_of(structure, params, windows))(params)
    return *optimizer.step(gradients, state, params), loss


@functools.partial(jax.jit, static_argnums=0)
def write(structure: Any, params: Any, prompt: jax.Array, seed: int) -> jax.Array:
    """The SAMPLE characters that follow a prompt of CONTEXT characters, drawn from its predictions one by one."""

    def step(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = nnx.merge(structure, params)(window[None])[0, -1]
        drawn = jax.random.categorical(key, scores / TEMPERATURE)
        return jnp.append(window[1:], drawn), drawn

    return jax.lax.scan(step, prompt, jax.random.split(jax.random.key(seed), SAMPLE))[1]


def train(steps: int, seed: int, run: Run, report: Report, broken: int = 0) -> None:
    """Train from where the run is; the record gets the losses and what the network writes before and after."""
    corpus, story = load()
    report.say(f"\nLanguage: {story}.")
    structure, params = functional(Transformer(len(corpus.alphabet), CONTEXT, nnx.Rngs(seed)))
    optimizer = make_optimizer(steps)
    state = optimizer.init(params)
    held_out = corpus.validation[: len(corpus.validation) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)

    def sample() -> str:
        prompt = jnp.array([corpus.alphabet.index(character) for character in PROMPT.rjust(CONTEXT)[-CONTEXT:]])
        return "".join(corpus.alphabet[token] for token in np.asarray(write(structure, params, prompt, seed)))

    log = run.record.setdefault("language", {})
    if not log:
        log |= {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "frequency_loss": frequency_loss(corpus),
            "before": sample(),
            "loss": [],
            "validation": [[0, float(evaluate(structure, params, held_out))]],
            "seconds": [],
        }
    report.say(f"  {log['parameters']:,} parameters, {log['state_bytes']:,} bytes of optimizer state\n")
    report.row(HEADER, HEADER)
    for number in range(len(log["validation"])):
        report.row(HEADER, cells(log, number))

    first, every = len(log["loss"]), max(1, steps // 20)
    if first:
        params, state = run.arrays((params, state), optimizer)
    with report.progress("language", steps, first) as advance:
        for step in range(first, steps):
            began = time.perf_counter()
            if broken and step % broken == 0:
                params, state, _ = train_step(structure, optimizer, params, state, corpus.train, seed, step, math.nan)
            params, state, loss = train_step(structure, optimizer, params, state, corpus.train, seed, step)
            log["loss"].append(float(loss))
            log["seconds"].append(time.perf_counter() - began)
            advance()
            due = (step + 1) % every == 0 or step + 1 == steps
            if due:
                log["validation"].append([step + 1, float(evaluate(structure, params, held_out))])
                report.row(HEADER, cells(log, -1))
            run.pause((params, state), optimizer, save=due)
    log |= {"after": sample(), "params_sha256": fingerprint(params)}


def frequency_loss(corpus: Corpus) -> float:
    """The held-out loss of who knows only how frequent each character is, in nats per character."""
    counts = np.bincount(corpus.train, minlength=len(corpus.alphabet)) + 1
    return float(-np.log(counts / counts.sum())[np.asarray(corpus.validation)].mean())


def cells(log: dict[str, Any], number: int) -> list[str]:
    """The table's row for a validation, with mean loss and median speed of the steps since the one before."""
    step, validation = log["validation"][number]
    if step == 0:
        return ["0", "", f"{validation:.3f}", ""]
    since = slice(log["validation"][number - 1][0], step)
    speed = BATCH * CONTEXT / statistics.median(log["seconds"][since])
    return [str(step), f"{statistics.fmean(log['loss'][since]):.3f}", f"{validation:.3f}", f"{speed:,.0f}"]


def summarize(log: dict[str, Any], report: Report) -> None:
    """What the network has learned, in its own words."""
    report.say(f"\nLanguage, after {len(log['loss'])} steps, goes on after | like this:\n")
    report.say(textwrap.indent(PROMPT + "|" + log["after"][:SHOWN], "    "))


def as_text(log: dict[str, Any]) -> str:
    """The samples, for a file."""
    parts = {"The prompt": PROMPT, "Before training": log["before"], "After training": log["after"]}
    return "\n\n".join(f"=== {title} ===\n{text}" for title, text in parts.items()) + "\n"
