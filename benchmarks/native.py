"""Time a step of AdamW on this machine's processors: optax, adamite's compiled kernels and, if it is there, torch.

    python benchmarks/native.py [--rounds 9] [--out out/native.json]

All run in turns in one process, on the same arrays, with the same threads; a ratio is the median of the ratios of each
turn. optax and the kernels are jitted with parameters and state donated; the step is the update and its application.
Torch's is AdamW(fused=True).
"""

import argparse
import functools
import importlib.util
import json
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

LARGE = [(250_000, 256)]
GPT2_SMALL = [
    (50257, 768), (1024, 768),
    *12 * [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,), *4 * [(768,)]],
]  # fmt: skip
MANY = 1000 * [(4096,)]
TREES = {"one leaf of 64M": LARGE, "GPT-2 small, 124M": GPT2_SMALL, "1000 leaves of 4096": MANY}

KINDS = {
    "native": dict(),
    "native, int8 moments": dict(moments="int8"),
    "native, bfloat16 moments": dict(moments="bfloat16"),
    "native, bfloat16 weights and int8 moments, residual8": dict(moments="int8", rounding="residual8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="a part of the name of a tree")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    results = {}
    for name, shapes in TREES.items():
        if options.only in name:
            results[name] = compare(shapes, options.rounds)
            print(f"\n{name}{'trace s':>59}{'compile s':>11}{'step ms':>10}{'of optax':>10}")
            for kind, row in results[name].items():
                first = f"{row['trace']:>12.2f}{row['compile']:>11.2f}" if "trace" in row else 23 * " "
                print(f"{kind:54}{first}{1000 * row['step']:>10.2f}{row['times optax']:>9.2f}x", flush=True)
    machine = {"processor": platform.processor(), "cores": jax.device_count() and _cores(), "jax": jax.__version__}
    print(f"\n{machine}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def compare(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, float]] = {}
    makers = {"optax.adamw": functools.partial(_optax, grads)}
    makers |= {kind: functools.partial(_native, grads, settings) for kind, settings in KINDS.items()}
    for kind, make in makers.items():
        rows[kind], steps[kind] = make()
    if importlib.util.find_spec("torch"):
        rows["torch.optim.AdamW, fused"], steps["torch.optim.AdamW, fused"] = _torch(grads)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(rounds + 1):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[kind].append(time.perf_counter() - start)
    for kind, seconds in times.items():
        rows[kind]["step"] = statistics.median(seconds)
        rows[kind]["times optax"] = statistics.median(
            theirs / ours for theirs, ours in zip(times["optax.adamw"], seconds, strict=True)
        )
    return rows


def _optax(grads: list[jax.Array]) -> tuple[dict[str, float], Callable[[], None]]:
    tx = optax.adamw(1e-3, weight_decay=0.1)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _jitted(step, tx, [jnp.ones_like(g) for g in grads], grads)


def _native(grads: list[jax.Array], settings: dict[str, Any]) -> tuple[dict[str, float], Callable[[], None]]:
    tx: Any = adamite.adamw(1e-3, weight_decay=0.1, **settings)
    dtype = jnp.bfloat16 if "rounding" in settings else jnp.float32

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        return tx.step(grads, state, params, engine="native")

    return _jitted(step, tx, [jnp.ones_like(g, dtype) for g in grads], [g.astype(dtype) for g in grads])


def _jitted(step: Any, tx: Any, params: Any, grads: Any) -> tuple[dict[str, float], Callable[[], None]]:
    held = [params, tx.init(params)]
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 2)).lower(held[0], grads, held[1])
    traced = time.perf_counter()
    compiled = lowered.compile()
    row = {"trace": traced - start, "compile": time.perf_counter() - traced}

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(held[0], grads, held[1]))

    return row, run


def _torch(grads: list[jax.Array]) -> tuple[dict[str, float], Callable[[], None]]:
    import torch  # pyright: ignore[reportMissingImports]  # only where `make parity` has installed it

    weights = [torch.ones(g.shape, requires_grad=True) for g in grads]
    for weight, g in zip(weights, grads, strict=True):
        weight.grad = torch.from_numpy(np.array(g))
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1, fused=True)
    return {}, optimizer.step


if __name__ == "__main__":
    main()
