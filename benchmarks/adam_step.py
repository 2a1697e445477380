"""What a step of Adam costs beside optax's: `make bench`.

One step is ``update`` and ``apply_updates`` under one jit, parameters and state donated. Two optimizers take turns, and
the ratio is the median over pairs of neighbouring runs, so that a change of the machine's speed cancels. Tracing
(Python) and compiling (XLA) are timed in the same way, with JAX's caches empty. torch's fused Adam runs beside for
reference, if torch is there (`make parity`).

An eager step is one ``update`` without jit, of two leaves of 4,096 and 64 numbers: there nearly all time is Python's.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamite

LEARNING_RATE = 1e-3
Run = Callable[[], Any]


def one_leaf() -> list[tuple[int, ...]]:
    return [(8192, 8192)]


def gpt2_small() -> list[tuple[int, ...]]:
    """The 148 arrays of GPT-2 small: 124,439,808 parameters."""
    d, layers = 768, 12
    norm = [(d,), (d,)]
    block = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * layers, *norm]


def many_leaves() -> list[tuple[int, ...]]:
    return [(4096,)] * 1000


TREES = {"one leaf of 64M": one_leaf, "GPT-2 small, 148 leaves": gpt2_small, "1,000 leaves of 4,096": many_leaves}


def step_of(tx: optax.GradientTransformation) -> Any:
    """A fresh, jitted training step without the model."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


class Contender:
    """One optimizer with its own parameters and state, ready to step."""

    def __init__(self, tx: optax.GradientTransformation, grads: list[jax.Array]) -> None:
        self.grads, self.step = grads, step_of(tx)
        self.params = [jnp.zeros_like(g) for g in grads]
        self.state = jax.jit(tx.init)(self.params)

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, self.grads))


def torch_contender(shapes: list[tuple[int, ...]], name: str = "Adam", **options: Any) -> Run | None:
    """The step of torch's fused optimizer of that name, if torch is there."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  # not a requirement: `make parity` installs it
    except ImportError:
        return None
    params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.full(p.shape, 0.01)
    return getattr(torch.optim, name)(params, LEARNING_RATE, fused=True, **options).step


def in_turns(prepare: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, one after the other, `rounds` times, every second round in reverse order.

    What comes before a run, its `prepare`, is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in prepare}
    for r in range(rounds):
        for name in list(prepare) if r % 2 == 0 else list(reversed(prepare)):
            run = prepare[name]()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure(shapes: list[tuple[int, ...]], step_rounds: int, compile_rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    makers = {"adamite": lambda: adamite.adam(LEARNING_RATE), "optax": lambda: optax.adam(LEARNING_RATE)}
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    states = {name: jax.eval_shape(make().init, abstract) for name, make in makers.items()}

    def trace(name: str) -> Any:
        return step_of(makers[name]()).trace(abstract, states[name], abstract)

    def to_trace(name: str) -> Run:
        jax.clear_caches()
        return lambda: trace(name)

    def to_compile(name: str) -> Run:
        jax.clear_caches()
        return trace(name).lower().compile

    runs: dict[str, Run] = {name: Contender(make(), grads) for name, make in makers.items()}
    torch_step = torch_contender(shapes)
    if torch_step:
        runs["torch fused"] = torch_step
    for run in [run for run in runs.values() for _ in range(2)]:
        run()
    steps = in_turns({name: lambda run=run: run for name, run in runs.items()}, step_rounds)
    traces = in_turns({name: lambda name=name: to_trace(name) for name in makers}, compile_rounds)
    compiles = in_turns({name: lambda name=name: to_compile(name) for name in makers}, compile_rounds)
    result: dict[str, Any] = {"parameters": sum(math.prod(shape) for shape in shapes), "leaves": len(shapes)}
    for kind, times in (("step", steps), ("trace", traces), ("compile", compiles)):
        result[kind] = {f"{name} ms": 1e3 * statistics.median(t) for name, t in times.items()}
        result[kind]["ratio"] = ratio(times["adamite"], times["optax"])
    if torch_step:
        result["step"]["ratio to torch fused"] = ratio(steps["adamite"], steps["torch fused"])
    return result


NAMES = (
    *("adam", "adamw", "nadam", "nadamw", "amsgrad", "adamax", "adamaxw", "radam", "adabelief", "adopt", "ademamix"),
    *("lamb", "lion", "sgd", "adagrad", "rmsprop"),
)
"""The optimizers that both have."""

EAGER_STEPS = 10


def eager_steps(tx: optax.GradientTransformation) -> Run:
    """Some eager steps in a row, after two that are not timed."""
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    state = tx.init(params)

    def run() -> None:
        nonlocal state
        for _ in range(EAGER_STEPS):
            state = jax.block_until_ready(tx.update(params, state, params))[1]

    run()
    return run


def measure_eager(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of an eager step."""
    theirs = getattr(optax if hasattr(optax, name) else optax.contrib, name)
    runs = {"adamite": eager_steps(getattr(adamite, name)(LEARNING_RATE)), "optax": eager_steps(theirs(LEARNING_RATE))}
    times = in_turns({library: lambda run=run: run for library, run in runs.items()}, rounds)
    medians = {f"{library} ms": 1e3 * statistics.median(t) / EAGER_STEPS for library, t in times.items()}
    return medians | {"ratio": ratio(times["adamite"], times["optax"])}


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("adamite", "jax", "jaxlib", "optax", "numpy")}
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Step, trace and compile time of adamite.adam beside optax.adam.")
    parser.add_argument("--steps", type=int, default=41, help="timed steps of each (default 41)")
    parser.add_argument("--compiles", type=int, default=9, help="timed traces and compilations of each (default 9)")
    parser.add_argument("--eager", type=int, default=31, help="timed rows of ten eager steps of each (default 31)")
    parser.add_argument("--only-eager", action="store_true", help="time eager steps alone")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench.json"))
    options = parser.parse_args()
    result = {"machine": machine(), "trees": {}}
    print(json.dumps(result["machine"]))
    print(f"{'':26}{'':9}{'adamite':>10}{'optax':>10}{'ratio':>8}{'torch fused':>14}   (medians, ms)")
    for name, shapes in () if options.only_eager else TREES.items():
        figures = measure(shapes(), options.steps, options.compiles)
        result["trees"][name] = figures
        for kind in ("step", "trace", "compile"):
            row = figures[kind]
            torch = f"{row['torch fused ms']:14.2f}" if "torch fused ms" in row else ""
            numbers = f"{row['adamite ms']:10.2f}{row['optax ms']:10.2f}{row['ratio']:8.3f}"
            print(f"{name if kind == 'step' else '':26}{kind:9}{numbers}{torch}", flush=True)
    result["eager step"] = {}
    for name in NAMES:
        row = result["eager step"][name] = measure_eager(name, options.eager)
        print(f"{name:26}{'eager':9}{row['adamite ms']:10.2f}{row['optax ms']:10.2f}{row['ratio']:8.3f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
