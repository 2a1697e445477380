"""Whole training steps in each framework's own loop, by `update` and by `tx.step`: `make bench-loops`.

A training step is the gradient of an MLP's squared error, and the optimizer's step, under one jit, model and state
donated. Weights with residuals are bfloat16; the data are float32, and so is the arithmetic of the model. The
contenders take turns in one process. "x" is how many times as fast a step is as the same framework's step with
`optax.adamw` in float32, the median over rounds. "compile" is CPU seconds to trace and compile, all threads together.

    update      what a loop does by itself: `nnx.Optimizer`, `TrainState`, or `update` and `apply_updates`
    step        `tx.step`: `adamite.flax.Optimizer`, `adamite.flax.TrainState`, or the method itself

With ``--wrappers`` the loop is plain JAX's, and what of Optax's stands around the optimizer differs: "x" is how many
times as fast a step is as that of `optax.adamw` inside of the same wrapper.
"""

import argparse
import functools
import gc
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import in_turns, machine
from flax import linen, nnx
from flax.training import train_state

import adamite
import adamite.flax

SIZES = {"10M": (1024, 1792, 1792, 1792, 1024), "20M": (1024, 2560, 2560, 2560, 1024)}
BATCH = 32
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "int8, residual8": {"moments": "int8", "rounding": "residual8"},
}
OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1}

TrainingStep = Callable[[], Any]
"""One training step; it returns arrays to wait for."""


def forward(weights: Any, x: jax.Array) -> jax.Array:
    for layer in weights[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ weights[-1]["w"] + weights[-1]["b"]


def loss_of(y: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((y - target).astype(jnp.float32) ** 2)


def plain(tx: Any, sizes: tuple[int, ...], dtype: Any, data: Any, *, by_step: bool) -> Any:
    """Plain JAX."""
    rng = np.random.default_rng(0)
    params = [
        {"w": jnp.asarray(rng.standard_normal((n, m)) * n**-0.5, dtype), "b": jnp.zeros(m, dtype)}
        for n, m in itertools.pairwise(sizes)
    ]
    state = jax.jit(tx.init)(params)

    def step(params: Any, state: Any, x: Any, target: Any) -> Any:
        grads = jax.grad(lambda params: loss_of(forward(params, x), target))(params)
        if by_step:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), [params, state], data


class LinenMLP(linen.Module):
    """The MLP in Linen."""

    sizes: tuple[int, ...]
    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The outputs."""
        for number, size in enumerate(self.sizes[1:], start=2):
            x = linen.Dense(size, param_dtype=self.dtype)(x)
            x = linen.relu(x) if number < len(self.sizes) else x
        return x


def in_linen(tx: Any, sizes: tuple[int, ...], dtype: Any, data: Any, *, by_step: bool) -> Any:
    """Flax Linen's TrainState."""
    model = LinenMLP(sizes, dtype)
    cls = adamite.flax.TrainState if by_step else train_state.TrainState
    params = model.init(jax.random.key(0), data[0])["params"]
    state = cls.create(apply_fn=model.apply, params=params, tx=tx)

    def step(state: Any, x: Any, target: Any) -> Any:
        grads = jax.grad(lambda params: loss_of(state.apply_fn({"params": params}, x), target))(state.params)
        return (state.apply_gradients(grads=grads),)

    return jax.jit(step, donate_argnums=0), [state], data


class NNXMLP(nnx.Module):
    """The MLP in NNX."""

    def __init__(self, sizes: tuple[int, ...], dtype: Any) -> None:
        rngs = nnx.Rngs(0)
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(n, m, param_dtype=dtype, rngs=rngs) for n, m in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The outputs."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def in_nnx(tx: Any, sizes: tuple[int, ...], dtype: Any, data: Any, *, by_step: bool) -> Any:
    """Flax NNX's Optimizer; model and optimizer are split and merged, as `nnx.jit` does at each call."""
    cls = adamite.flax.Optimizer if by_step else nnx.Optimizer
    model = NNXMLP(sizes, dtype)
    graph, state = nnx.split((model, cls(model, tx, wrt=nnx.Param)))

    def step(state: Any, x: Any, target: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(x), target))(model))
        return (nnx.state((model, optimizer)),)

    return jax.jit(step, donate_argnums=0), [state], data


def in_equinox(tx: Any, sizes: tuple[int, ...], dtype: Any, data: Any, *, by_step: bool) -> Any:
    """Equinox, whose models have functions among their leaves."""
    keys = jax.random.split(jax.random.key(0), len(sizes))
    layers: list[Any] = []
    for n, m, key in zip(sizes, sizes[1:], keys, strict=False):
        layers += [eqx.nn.Linear(n, m, dtype=dtype, key=key), eqx.nn.Lambda(jax.nn.relu)]
    model = eqx.nn.Sequential(layers[:-1])
    state = jax.jit(tx.init)(eqx.filter(model, eqx.is_inexact_array))

    @functools.partial(eqx.filter_jit, donate="all-except-first")
    def step(batch: Any, model: Any, state: Any) -> Any:
        x, target = batch
        grads = eqx.filter_grad(lambda model: loss_of(jax.vmap(model)(x), target))(model)
        if by_step:
            return tx.step(grads, state, model)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.combine(optax.apply_updates(params, updates), static), state

    return (lambda model, state, *batch: step(batch, model, state)), [model, state], data


FRAMEWORKS = {"plain JAX": plain, "Flax NNX": in_nnx, "Flax Linen": in_linen, "Equinox": in_equinox}


def _optimizer(formats: dict[str, Any] | None) -> Any:
    return optax.adamw(**OPTIONS) if formats is None else adamite.adamw(**OPTIONS, **formats)


def _first_layer_frozen(tx: Any) -> Any:
    def labels(params: Any) -> Any:
        first, *others = params
        return [jax.tree.map(lambda _: "frozen", first), *jax.tree.map(lambda _: "trained", others)]

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def _multi_steps(tx: Any) -> Any:
    steps: Any = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def _injected(formats: dict[str, Any] | None) -> Any:
    make = optax.adamw if formats is None else adamite.adamw
    static = () if formats is None else ("moments", "rounding")
    return optax.inject_hyperparams(make, static_args=static)(**OPTIONS, **(formats or {}))


def _around(wrap: Callable[[Any], Any]) -> Callable[[dict[str, Any] | None], Any]:
    return lambda formats: wrap(_optimizer(formats))


WRAPPERS: dict[str, Callable[[dict[str, Any] | None], Any]] = {
    "nothing": _optimizer,
    "partition, a layer frozen": _around(_first_layer_frozen),
    "masked": _around(lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda p: p.ndim > 1, params))),
    "inject_hyperparams": _injected,
    "chain, clip_by_global_norm": _around(lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)),
    "named_chain, clip": _around(lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("adamw", tx))),
    "MultiSteps, every 2": _around(_multi_steps),
    "apply_if_finite": _around(lambda tx: optax.apply_if_finite(tx, 5)),
}


class Contender:
    """A training step with its own model and state."""

    def __init__(self, step: Any, held: list[Any], data: Any) -> None:
        self.step, self.held, self.data = step, held, data
        start = time.process_time()
        self()
        self.compile = time.process_time() - start
        self()

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self.held = list(self.step(*self.held, *self.data))
        jax.block_until_ready(jax.tree.leaves(self.held))


def contenders(frameworks: list[str], formats: list[str]) -> Iterator[tuple[str, str, str, str, Callable[..., Any]]]:
    """Framework, format, way, the name of what it is compared with, and how it is made."""
    for framework in frameworks:
        make = functools.partial(FRAMEWORKS[framework], by_step=False)
        base = f"{framework}, optax"
        yield framework, "optax float32", "update", base, lambda *of, make=make: make(optax.adamw(**OPTIONS), *of)
        for name in formats:
            for way in ("update", "step"):
                make = functools.partial(FRAMEWORKS[framework], by_step=way == "step")
                yield (
                    framework, name, way, base,
                    lambda *of, make=make, name=name: make(_optimizer(FORMATS[name]), *of),
                )  # fmt: skip


def wrapped(formats: list[str]) -> Iterator[tuple[str, str, str, str, Callable[..., Any]]]:
    """The like, for each wrapper."""
    for wrapper, make in WRAPPERS.items():
        yield wrapper, "optax float32", "update", wrapper, lambda *of, make=make: plain(make(None), *of, by_step=False)
        for name in formats:
            if wrapper == "apply_if_finite" and "rounding" in FORMATS[name]:
                continue  # it fails where updates are wider than gradients
            yield (
                wrapper, name, "update", wrapper,
                lambda *of, make=make, name=name: plain(make(FORMATS[name]), *of, by_step=False),
            )  # fmt: skip


def compare(rows: list[tuple[str, str, str, str, Callable[..., Any]]], sizes: tuple[int, ...], rounds: int) -> Any:
    """The figures of all contenders, those that share a base in turns."""
    rng = np.random.default_rng(1)
    figures: list[dict[str, Any]] = []
    for base in dict.fromkeys(row[3] for row in rows):
        runs: dict[tuple[str, str, str], Contender] = {}
        for framework, name, way, own_base, make in rows:
            if own_base == base:
                dtype = jnp.bfloat16 if "residual8" in name else jnp.float32
                data = [jnp.asarray(rng.standard_normal((BATCH, n)), jnp.float32) for n in (sizes[0], sizes[-1])]
                jax.clear_caches()
                runs[framework, name, way] = Contender(*make(sizes, dtype, data))
        times = list(in_turns({str(key): lambda run=run: run for key, run in runs.items()}, rounds).values())
        for (key, run), own in zip(runs.items(), times, strict=True):
            row = dict(zip(("loop", "format", "way"), key, strict=True)) | {
                "ms": 1e3 * statistics.median(own),
                "x": statistics.median(a / b for a, b in zip(times[0], own, strict=True)),
                "compile s": run.compile,
            }
            figures.append(row)
            print(
                f"{row['loop']:28}{row['format']:18}{row['way']:8}{row['ms']:9.1f}{row['x']:7.2f}"
                f"{row['compile s']:9.1f}",
                flush=True,
            )
        del runs
        gc.collect()
    return figures


def draw(figures: list[dict[str, Any]], path: pathlib.Path) -> None:
    """How many times as fast as optax's: a group of bars for each format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loops = list(dict.fromkeys(row["loop"] for row in figures))
    figure, axes = plt.subplots(1, len(loops), figsize=(3.2 * len(loops), 3.4), sharey=True, squeeze=False)
    for ax, loop in zip(axes[0], loops, strict=True):
        own = [row for row in figures if row["loop"] == loop and row["format"] != "optax float32"]
        names = list(dict.fromkeys(row["format"] for row in own))
        for way, color, shift in (("update", "#3070b0", -0.2), ("step", "#208050", 0.2)):
            bars = [(names.index(row["format"]) + shift, row["x"]) for row in own if row["way"] == way]
            for x, y in bars:
                ax.bar(x, y, 0.38, color=color, label=way if x < 0.5 else None)
                ax.text(x, y, f"{y:.2f}", ha="center", va="bottom", fontsize=7)
        ax.axhline(1.0, color="k", lw=1)
        ax.set(title=loop)
        ax.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axes[0][0].set_ylabel("speed of a training step, optax.adamw = 1")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole training steps in each framework's loop.")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--size", choices=SIZES, default="20M", help="parameters of the MLP (default 20M)")
    parser.add_argument("--only", default="", help="a part of the name of a framework or wrapper")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--wrappers", action="store_true", help="compare Optax's wrappers in place of frameworks")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    options = parser.parse_args()
    rows = wrapped(options.formats) if options.wrappers else contenders(list(FRAMEWORKS), options.formats)
    out = options.out or pathlib.Path("out") / ("loops-wrappers.json" if options.wrappers else "loops.json")
    result: dict[str, Any] = {"machine": machine(), "parameters": options.size, "batch": BATCH}
    print(json.dumps(result["machine"]))
    print(f"{'loop':28}{'format':18}{'way':8}{'ms':>9}{'x':>7}{'compile s':>10}")
    chosen = [row for row in rows if options.only in row[0]]
    result["rows"] = compare(chosen, SIZES[options.size], options.rounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    if not options.wrappers:
        draw(result["rows"], out.with_suffix(".png"))
        print(f"wrote {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
