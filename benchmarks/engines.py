"""What a whole step of AdamW costs, by each engine, storage and rounding: `make bench-engines`.

All contenders take turns in one process on arrays of the same numbers, parameters and state donated; optax's step is
``update`` and ``apply_updates``, torch's is ``AdamW(fused=True)``, if torch is there (`make parity`). A ratio is the
median over rounds. For each contender:

    bytes    that it must move for a parameter: weights, gradients and state read, weights and state written
    copy     the share of the bandwidth that this is, of that at which a large array is scaled in place
             in the same round; above 100% where arrays are in a cache, or the machine is noisy
    x        how many times as fast as optax.adamw in float32

"nothing" is a program that returns the arrays it is given: the part of every step that is JAX's.
"""

import argparse
import functools
import gc
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import LEARNING_RATE, gpt2_small, in_turns, machine, many_leaves, one_leaf, torch_contender

import adamite
from adamite.engines.native.library import library

TREES = {
    "one leaf of 64M": one_leaf,
    "GPT-2 small, 148 leaves": gpt2_small,
    "1,000 leaves of 4,096": many_leaves,
    "8 leaves of 16M": lambda: [(4096, 4096)] * 8,
}
KEPT = [
    ("float32", None),
    ("bfloat16", None),
    ("int8", None),
    ("bfloat16", "stochastic"),
    ("int8", "stochastic"),
    ("int8", "residual8"),
]
COPIED = 2**26
DECAY = 0.1


class Contender:
    """A compiled step with its own parameters and state."""

    def __init__(self, step: Any, tx: Any, params: Any, grads: Any) -> None:
        self.grads, self.held = grads, [params, jax.jit(tx.init)(params)]
        kept = sum(x.nbytes for x in jax.tree.leaves(self.held))
        self.bytes = (2 * kept + sum(g.nbytes for g in grads)) / sum(g.size for g in grads)
        start = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=(0, 1))
        lowered = self.step.lower(*self.held, grads)
        self.trace = time.perf_counter() - start
        lowered.compile()  # to time it only: training calls the jitted function, and a step is timed by that
        self.compile = time.perf_counter() - start - self.trace

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self.held[:] = jax.block_until_ready(self.step(*self.held, self.grads))


def of_optax(grads: list[jax.Array]) -> Contender:
    tx = optax.adamw(LEARNING_RATE, weight_decay=DECAY)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Contender(step, tx, [jnp.ones_like(g) for g in grads], grads)


def of_nothing(grads: list[jax.Array]) -> Contender:
    """No step: the same arrays, given and returned."""
    tx = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    contender = Contender(lambda params, state, _: (params, state), tx, [jnp.ones_like(g) for g in grads], grads)
    contender.bytes = 0.0
    return contender


def of_adamite(engine: str, moments: str, rounding: str | None, grads: list[jax.Array]) -> Contender:
    tx = adamite.adamw(LEARNING_RATE, weight_decay=DECAY, moments=moments, rounding=rounding)
    dtype = jnp.bfloat16 if rounding else jnp.float32

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return tx.step(grads, state, params, engine=engine)

    return Contender(step, tx, [jnp.ones_like(g, dtype) for g in grads], [g.astype(dtype) for g in grads])


def compare(shapes: list[tuple[int, ...]], engines: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """The figures of all contenders on one tree. Each is measured beside optax and the copy, then dropped."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    large = [jnp.ones(COPIED)]
    scale = jax.jit(lambda x: x * 1.5, donate_argnums=0).lower(*large).compile()

    def copy() -> None:
        large[:] = [jax.block_until_ready(scale(*large))]

    parameters = sum(map(math.prod, shapes))
    theirs = of_optax(grads)
    makers: dict[str, Callable[[], Any]] = {"nothing": functools.partial(of_nothing, grads)}
    makers["optax.adamw, float32"] = lambda: theirs
    makers["torch.optim.AdamW, fused, float32"] = functools.partial(
        torch_contender, shapes, "AdamW", weight_decay=DECAY
    )
    for engine in engines:
        lean = engine != "xla" or len(shapes) == 1  # XLA compiles many lean leaves for minutes
        for moments, rounding in KEPT if lean else KEPT[:1]:
            name = f"{engine}: {moments} moments, {rounding or 'float32'} weights"
            makers[name] = functools.partial(of_adamite, engine, moments, rounding, grads)
    rows = {}
    for name, make in makers.items():
        contender = make()
        if contender is None:
            continue
        runs = {"copy": copy, "optax": theirs, "ours": contender}
        for run in runs.values():
            run()
        times = in_turns({kind: lambda run=run: run for kind, run in runs.items()}, rounds)
        seconds = statistics.median(times["ours"])
        moved = contender.bytes if isinstance(contender, Contender) else 28.0
        row = rows[name] = {
            "ms": 1e3 * seconds,
            "bytes": moved,
            "copy": statistics.median(
                (moved * parameters / ours) / (8 * COPIED / copied)
                for ours, copied in zip(times["ours"], times["copy"], strict=True)
            ),
            "x": statistics.median(a / b for a, b in zip(times["optax"], times["ours"], strict=True)),
        }
        if isinstance(contender, Contender):
            row |= {"trace s": contender.trace, "compile s": contender.compile}
        shown = f"{row['trace s']:8.2f}{row['compile s']:9.2f}" if "trace s" in row else " " * 17
        print(f"  {name:48}{row['ms']:10.2f}{moved:8.2f}{row['copy']:8.0%}{row['x']:8.2f}{shown}", flush=True)
        del contender, runs
        gc.collect()
    return rows


def draw(shown: dict[str, dict[str, dict[str, float]]], path: pathlib.Path) -> None:
    """The roofline: time against bytes; the line is the copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 4.2), sharey=True, squeeze=False)
    colors = {"optax": "#888888", "torch": "#d08000", "xla": "#3070b0", "native": "#208050", "pallas": "#208050"}
    for ax, (name, rows) in zip(axes[0], shown.items(), strict=True):
        base = rows["optax.adamw, float32"]
        bytes_moved = np.array([8.0, 30.0])
        ax.plot(bytes_moved, bytes_moved * base["copy"] / base["bytes"], "k", lw=1, label="as fast as memory")
        for kind, row in rows.items():
            if not row["bytes"]:
                continue
            engine = kind.split(":")[0].split(".")[0]
            label = engine if engine not in ax.get_legend_handles_labels()[1] else None
            ax.plot(row["bytes"], 1 / row["x"], "o", color=colors[engine], label=label)
        ax.set(title=name, xlabel="bytes moved for a parameter", xlim=(8, 30), yscale="log")
        ax.set_yticks(ticks := [0.25, 0.5, 1, 2, 4, 8], [f"{tick:g}" for tick in ticks])
        ax.set_yticks([], minor=True)
        ax.set_xticks(range(8, 32, 4))
    axes[0][0].set_ylabel("time of a step, in steps of optax.adamw")
    axes[0][len(shown) // 2].legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole steps of AdamW by each engine, storage and rounding.")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each (default 11)")
    parser.add_argument("--only", default="", help="a part of the name of a tree")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/engines.json"))
    options = parser.parse_args()
    platform = jax.default_backend()
    kernels = ["native"] if platform == "cpu" and library() else ["pallas"] if platform != "cpu" else []
    result: dict[str, Any] = {"machine": machine(), "trees": {}}
    print(json.dumps(result["machine"]))
    for name, shapes in TREES.items():
        if options.only in name:
            print(f"{name:50}{'ms':>10}{'bytes':>8}{'copy':>8}{'x':>8}{'trace s':>8}{'compile s':>10}")
            result["trees"][name] = compare(shapes(), ["xla", *kernels], options.rounds)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")
    if large := {name: rows for name, rows in result["trees"].items() if "1,000" not in name}:
        draw(large, options.out.with_suffix(".png"))
        print(f"wrote {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
