"""What guards, accumulation and telemetry cost to trace and compile beside the plain optimizer: `make bench-compile`.

One program is the ``update`` of AdamW under jit, the state donated, for 20 to 160 leaves, all of one shape or all of
different shapes. Times are CPU seconds of this process, all its threads together, so that neither other processes nor
the number of cores count. The ratio is to the plain optimizer's sum of both. XLA's CPU compiler takes about the same
time for every loop that it makes: ``loops`` is how many of them write an array of a leaf's size, per leaf.

With ``--tpu`` (`make tpu-check`) the program is a whole step, compiled for a TPU v5e without one: ``tx.step`` by the
Pallas kernel beside ``optax.adamw`` in float32. The optimizers take turns. Figures are medians over the rounds, and so
is the ratio, of neighbouring runs. ``kernels`` is how many different ones the program has, ``moved`` counts bytes.
"""

import argparse
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import gpt2_small, machine, many_leaves
from hlo_bytes import moved
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adamite

CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda tx: tx,
    "skip_nonfinite": adamite.skip_nonfinite,
    "skip_spikes": adamite.skip_spikes,
    "accumulate": lambda tx: adamite.accumulate(tx, 4),
    "accumulate(skip_nonfinite)": lambda tx: adamite.accumulate(adamite.skip_nonfinite(tx), 4),
    "with_telemetry": adamite.with_telemetry,
    "with_telemetry, every 100": lambda tx: adamite.with_telemetry(tx, every=100),
    "optax.MultiSteps(apply_if_finite)": lambda tx: _as_optax(optax.MultiSteps(optax.apply_if_finite(tx, 5), 4)),
}
CHOICES = {"float32": {}, "int8": {"moments": "int8"}}
KERNEL = re.compile(r'"body":"([^"]*)"')
LOOP = re.compile(r"^ +(?:ROOT )?%\S+ = \S*\[\d+,\d+\]\S* fusion\(", re.MULTILINE)


def _as_optax(tx: Any) -> Any:
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


def shapes(leaves: int, *, equal: bool) -> list[tuple[int, int]]:
    return [(128, 256) if equal else (64 + number, 256) for number in range(leaves)]


def measure(name: str, leaves: int, choice: str, *, equal: bool) -> dict[str, float]:
    """Of one program."""
    jax.clear_caches()
    tx = CONTENDERS[name](adamite.adamw(1e-3, **CHOICES[choice]))
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(leaves, equal=equal)]
    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    lowered = jax.jit(lambda grads, state, params: tx.update(grads, state, params), donate_argnums=1).lower(
        params, state, params
    )
    traced = time.process_time()
    program: Any = lowered.compile()
    compiled = time.process_time()
    return {
        "trace s": traced - start,
        "compile s": compiled - traced,
        "loops per leaf": len(LOOP.findall(program.as_text() or "")) / leaves,
    }


def decoder_7b() -> list[tuple[int, ...]]:
    """The 291 arrays of a decoder of 6,738,415,616 parameters, as LLaMA's."""
    d, hidden, vocabulary, layers = 4096, 11008, 32000, 32
    block = [(d,), *[(d, d)] * 4, (d,), *[(d, hidden)] * 2, (hidden, d)]
    return [(vocabulary, d), *block * layers, (d,), (d, vocabulary)]


TREES = {"GPT-2 small, 148 leaves": gpt2_small, "1,000 leaves of 4,096": many_leaves, "7B, 291 leaves": decoder_7b}
SPREAD = "7B, 291 leaves"
"""The tree that is cut over 32 chips: rows of matrices, while vectors are replicated."""
STEPS: dict[str, tuple[Any, str | None] | None] = {
    "optax": None,
    "float32": ("float32", None),
    "bfloat16 moments": ("bfloat16", None),
    "int8": ("int8", None),
    "int8, residual8": ("int8", "residual8"),
}


def compile_for_tpu(
    shapes: list[tuple[int, ...]], choice: tuple[Any, str | None] | None, *, spread: bool = False
) -> dict[str, float]:
    """Of one step, on one chip or on 32."""
    jax.clear_caches()
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x8" if spread else "v5e:2x4").devices
    mesh = Mesh(np.array(chips if spread else chips[:1]), ("chip",), (AxisType.Explicit if spread else AxisType.Auto,))

    def placed(tree: Any) -> Any:
        def one(x: Any) -> Any:
            spec = PartitionSpec("chip") if spread and len(x.shape) > 1 else PartitionSpec()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    tx: Any
    if choice is None:
        tx, dtype = optax.adamw(1e-3), jnp.float32
    else:
        moments, rounding = choice
        tx, dtype = adamite.adamw(1e-3, moments=moments, rounding=rounding), jnp.bfloat16 if rounding else jnp.float32

    def step(params: Any, state: Any, grads: Any) -> Any:
        if choice is not None:
            return tx.step(grads, state, params, engine="pallas")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = placed([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])
    n = sum(map(math.prod, shapes)) / (32 if spread else 1)  # of matrices nearly all
    with jax.set_mesh(mesh):
        state = placed(jax.eval_shape(tx.init, params))
        start = time.process_time()
        trace = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)
        traced = time.process_time()
        lowered = trace.lower()
        compiling = time.process_time()
        program: Any = lowered.compile()
        compiled = time.process_time()
    text = program.as_text() or ""
    return {
        "trace s": traced - start,
        "lower s": compiling - traced,
        "compile s": compiled - compiling,
        "all s": compiled - start,
        "kernels": len(set(KERNEL.findall(text))),
        "moved, bytes per parameter": moved(text)[0] / n,
        "beside, bytes per parameter": program.memory_analysis().temp_size_in_bytes / n,
    }


def on_tpu(rounds: int, trees: list[str]) -> dict[str, Any]:
    """Medians of each step of each tree."""
    compile_for_tpu([(128, 256)], STEPS["int8"])  # the first program of a process takes longer
    result: dict[str, Any] = {}
    for tree in trees:
        heads = f"{'trace s':>10}{'lower s':>10}{'compile s':>11}{'all s':>8}{'ratio':>8}{'kernels':>9}{'moved':>8}"
        print(f"\n{tree:28}{heads}")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
        for _ in range(rounds):
            for name, choice in STEPS.items():
                runs[name].append(compile_for_tpu(TREES[tree](), choice, spread=tree == SPREAD))
                runs[name][-1]["ratio"] = runs[name][-1]["all s"] / runs["optax"][-1]["all s"]
        for name, its in runs.items():
            row = {figure: statistics.median(run[figure] for run in its) for figure in its[0]}
            result.setdefault(tree, {})[name] = row
            print(
                f"{name:28}{row['trace s']:10.2f}{row['lower s']:10.2f}{row['compile s']:11.2f}{row['all s']:8.2f}"
                f"{row['ratio']:8.2f}{row['kernels']:9.0f}{row['moved, bytes per parameter']:8.2f}",
                flush=True,
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds to trace and compile guards and the like.")
    parser.add_argument("--tpu", action="store_true", help="steps by the kernel for TPUs (see `make tpu-check`)")
    parser.add_argument("--rounds", type=int, default=3, help="with --tpu")
    parser.add_argument("--trees", choices=TREES, nargs="+", default=list(TREES), help="with --tpu")
    parser.add_argument("--leaves", type=int, nargs="+", default=[20, 40, 80, 160])
    parser.add_argument("--moments", choices=CHOICES, default="float32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compile-time.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    if options.tpu:
        result: dict[str, Any] = {"machine": machine(), "compiled for": "TPU v5e", "rounds": options.rounds}
        print(json.dumps(result["machine"]))
        _write(options.out, result | on_tpu(options.rounds, options.trees))
        return
    measure("plain", 2, options.moments, equal=True)  # the first program of a process takes longer
    result = {"machine": machine(), "moments": options.moments}
    print(json.dumps(result["machine"]))
    for equal in (False, True):
        kind = "equal shapes" if equal else "different shapes"
        print(f"\n{kind:36}{'leaves':>8}{'trace s':>10}{'compile s':>11}{'ratio':>8}{'loops':>8}")
        plain: dict[int, float] = {}
        for name in CONTENDERS:
            for leaves in options.leaves:
                row = measure(name, leaves, options.moments, equal=equal)
                total = row["trace s"] + row["compile s"]
                row["ratio"] = total / plain.setdefault(leaves, total)
                result.setdefault(kind, {}).setdefault(name, {})[str(leaves)] = row
                print(
                    f"{name:36}{leaves:8}{row['trace s']:10.2f}{row['compile s']:11.2f}{row['ratio']:8.2f}"
                    f"{row['loops per leaf']:8.1f}",
                    flush=True,
                )
    _write(options.out, result)


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
